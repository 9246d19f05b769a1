"""``isogrid memory``: what a training step holds, predicted and measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.errors import IsogridError


def memory(
    model: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub name, or smollm2-135m, minilm, vit-s-saliency.")
    ],
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help="adamw, or a method of isogrid.optim: default, galore, rsvd_adam, …; repeatable."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the subspaces.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Sequences, or images, of a step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    state: Annotated[str, typer.Option(help="Precision of states: float32, bfloat16 or 8bit.")] = "float32",
    in_backward: Annotated[bool, typer.Option(help="Step each parameter as its gradient arrives.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table.md, memory.csv, data.json, memory.png.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the made-up batch.")] = 0,
    quick: Annotated[bool, typer.Option(help="Two short sequences.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Account for the memory of a training step: parameters, gradients, optimizer state by key, activations."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from isogrid.cli.source import open_model
    from isogrid.evaluation import peak_memory_bytes

    methods = optimizer or ["adamw", "default"]
    if quick:
        batch, length = 2, 32
    loaded, _ = open_model(model, dtype=dtype)
    inputs = made_up_batch(loaded, batch, length, torch.Generator().manual_seed(seed))
    rows: list[dict[str, Any]] = []
    for method in methods:
        found = breakdown(copy.deepcopy(loaded), method, inputs, rank=rank, state=state, in_backward=in_backward)
        rows += [
            {
                "optimizer": method,
                "part": part,
                "predicted_bytes": found["predicted"].get(part),
                "measured_bytes": found["measured"].get(part),
            }
            for part in dict.fromkeys([*found["predicted"], *found["measured"]])
        ]
    result = {
        "title": f"Memory of a training step of {model}, {batch} x {length}, rank {rank}",
        "rows": rows,
        "peak_memory": peak_memory_bytes(),
    }
    if out is not None:
        write(result, out)
    console = Console()
    if as_json:
        console.print_json(json.dumps(result))
        return
    table = Table(title=str(result["title"]), title_justify="left")
    for heading in ("optimizer", "part", "predicted MiB", "measured MiB"):
        table.add_column(heading, justify="right" if "MiB" in heading else "left")
    for row in [*rows, *totals(rows)]:
        table.add_row(
            row["optimizer"], row["part"], mebibytes(row["predicted_bytes"]), mebibytes(row["measured_bytes"])
        )
    console.print(table)
    console.print("activations: outputs of leaf modules in one forward pass, the source's proxy", highlight=False)
    if out is not None:
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


# Parts of other parts, or another measure of one: shown, never summed.
BESIDE = ("of which factors", "saved for backward")


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of sums for each optimizer."""
    summed = []
    for method in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row for row in rows if row["optimizer"] == method and row["part"] not in BESIDE]
        columns = {key: sum(row[key] or 0 for row in mine) for key in ("predicted_bytes", "measured_bytes")}
        summed.append({"optimizer": method, "part": "total", **columns})
    return summed


def mebibytes(count: int | None) -> str:
    """``"510.8266"``, a dash where nothing was predicted."""
    return "–" if count is None else f"{count / 2**20:,.4f}"


def made_up_batch(model: Any, batch: int, length: int, generator: Any) -> dict[str, Any]:
    """Random tokens, or images, of the form the model takes.

    Raises:
        IsogridError: the model's input is of another kind.
    """
    import torch

    config = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", "")
    if kind == "input_ids" and config is not None:
        longest = getattr(config, "max_position_embeddings", length) or length
        if length > longest:
            raise IsogridError(f"--length {length} is beyond the model's {longest} positions")
        ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
        return {"input_ids": ids}
    if kind == "pixel_values" and config is not None:
        sizes = config if hasattr(config, "image_size") else getattr(config, "backbone_config", None)
        size = getattr(sizes, "image_size", None)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(sizes, "num_channels", 3)
            return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}
    raise IsogridError(f"{type(model).__name__} takes {kind or 'unknown inputs'}; memory knows tokens and images")


def breakdown(
    model: Any, method: str, inputs: dict[str, Any], *, rank: int, state: str, in_backward: bool
) -> dict[str, dict[str, int]]:
    """The accounting of one optimizer on a model of its own."""
    import torch

    from isogrid.optim import PRESETS, make_optimizer, memory_breakdown

    model.train()
    if hasattr(model, "config"):
        model.config.use_cache = False
    if method == "adamw":
        made: Any = torch.optim.AdamW(model.parameters())
    elif method not in PRESETS:
        raise IsogridError(f"optimizer {method!r} is unknown; there are adamw, {', '.join(PRESETS)}")
    else:
        options: dict[str, Any] = {"state": state, "in_backward": in_backward}
        if method == "rsvd_adam":
            from isogrid.optim import FixedRank

            options["rank"] = FixedRank(rank, clip=True)
        elif method not in ("top_r", "apollo_mini"):
            options["rank"] = rank
        made = make_optimizer(model, method, **options)

    def loss_of(output: Any) -> Any:
        outputs = output if isinstance(output, tuple | list) else output.values()
        return sum(part.float().square().mean() for part in outputs if torch.is_tensor(part))

    return memory_breakdown(model, made, inputs, loss_of)


def write(result: dict[str, Any], out: Path) -> None:
    """``data.json``, ``memory.csv``, ``table.md`` and the stacked bars."""
    from isogrid.report import replace_file, save_figure, stacked_bars, write_csv, write_json

    write_json(result, out / "data.json")
    write_csv(result["rows"], out / "memory.csv")
    lines = [f"# {result['title']}", "", "| Optimizer | Part | Predicted MiB | Measured MiB |", "| - | - | -: | -: |"]
    lines += [
        f"| {row['optimizer']} | {row['part']} | {mebibytes(row['predicted_bytes'])} | "
        f"{mebibytes(row['measured_bytes'])} |"
        for row in [*result["rows"], *totals(result["rows"])]
    ]
    replace_file(out / "table.md", "\n".join([*lines, ""]).encode())
    bars: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        for column in ("predicted", "measured"):
            bar = bars.setdefault(f"{row['optimizer']}, {column}", {})
            if row["part"] not in BESIDE and row[f"{column}_bytes"]:
                bar[row["part"]] = row[f"{column}_bytes"]
    save_figure(stacked_bars(bars, title=result["title"]), out / "memory.png")
