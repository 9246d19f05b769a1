"""The source's table of optimizer memory: rSVDAdam's state on DistilBERT, predicted and summed over live tensors.

Bal, Hariharane, Gobinathan 2025. The model has DistilBERT's shapes and random weights: memory knows shapes only.
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isogrid.optim import (
    FixedRank,
    FractionRank,
    ProjectedAdamW,
    galore,
    predicted_state_bytes,
    projection_flops,
    rsvd_adam,
    state_bytes,
)
from isogrid.report import (
    describe_machine,
    progress,
    read_json,
    replace_file,
    save_figure,
    stacked_bars,
    today,
    write_csv,
    write_json,
)
from isogrid.studies.rows import Say, remembered

WIDTH, MLP, LAYERS, VOCABULARY, POSITIONS, CLASSES = 768, 3072, 6, 30522, 512, 2
RANKS = (4, 8, 16, 64, 128)
# Bytes of the source's table; Adam's hold one float32 step counter a parameter.
PUBLISHED = {4: 3_060_664, 8: 5_625_688, 16: 10_747_544, 64: 41_495_064, 128: 82_494_488}
PUBLISHED_ADAM = 535_640_496


class DistilBertShapes(nn.Module):
    """The 104 parameters of DistilBERT-base with a two-class head: 66,955,010 numbers. It computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.embedding_norm = nn.LayerNorm(WIDTH)
        for layer in range(LAYERS):
            for name in ("q", "k", "v", "out"):
                self.add_module(f"layer{layer}_{name}", nn.Linear(WIDTH, WIDTH))
            self.add_module(f"layer{layer}_attention_norm", nn.LayerNorm(WIDTH))
            self.add_module(f"layer{layer}_up", nn.Linear(WIDTH, MLP))
            self.add_module(f"layer{layer}_down", nn.Linear(MLP, WIDTH))
            self.add_module(f"layer{layer}_output_norm", nn.LayerNorm(WIDTH))
        self.pre_classifier, self.classifier = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)


def base_flops(batch: int = 32, length: int = 128) -> int:
    """Multiplications and additions of forward and backward pass as the source's profiler counts them.

    ``3 [L 2 (4 d² + 2 d f) tokens + 2 batch (d² + 2 d)] + 19 tokens d``: matrix products of linear layers three times
    (attention's own products are not seen), and 19 elementwise products over token tensors.
    """
    tokens = batch * length
    layers = LAYERS * 2 * (4 * WIDTH**2 + 2 * WIDTH * MLP) * tokens
    head = 2 * batch * (WIDTH**2 + CLASSES * WIDTH)
    return 3 * (layers + head) + 19 * tokens * WIDTH


def lora_flops(rank: int, batch: int = 32, length: int = 128) -> int:
    """The source's step with LoRA on q, k and v: the stored constant without gradients of weights, plus a slope."""
    tokens = batch * length
    slope = tokens * (18 * 3 * 2 * (WIDTH + WIDTH) - 3 * 2 * WIDTH)
    return 681_632_366_592 * tokens // 4096 + slope * rank


def sentence_flops(tokens: int = 11) -> int:
    """The source's dense forward pass of one sentence."""
    layers = LAYERS * 2 * (4 * WIDTH**2 + 2 * WIDTH * MLP)
    return tokens * (layers + 13 * WIDTH) + 2 * (WIDTH**2 + CLASSES * WIDTH)


def rsvd(model: nn.Module, rank: int) -> ProjectedAdamW:
    """rSVDAdam with the source's rule, ``r = max(1, floor(rank / 768 · min(m, n)))`` for every matrix."""
    return rsvd_adam(model.parameters(), rank_fraction=rank / WIDTH, decoupled=True)


def optimizers() -> dict[str, Any]:
    """Name and maker of every row."""
    made: dict[str, Any] = {f"rSVDAdam, rank {rank}": partial(_rsvd, rank) for rank in RANKS}
    made |= {f"GaLore, rank {rank}": partial(_galore, rank, "auto") for rank in RANKS}
    made |= {f"GaLore, long side, rank {rank}": partial(_galore, rank, "min_state") for rank in (4, 16, 128)}
    made |= {f"rSVDAdam, fixed rank {rank}": partial(_fixed, rank) for rank in RANKS}
    made |= {f"rSVDAdam, fraction {share:g}": partial(_fraction, share) for share in (0.01, 0.05, 0.1, 0.25, 0.5)}
    made |= {f"Isogrid's default, rank {rank}": partial(_own, rank) for rank in RANKS}
    made["Adam"] = lambda model: torch.optim.Adam(model.parameters())
    return made


def _rsvd(rank: int, model: nn.Module) -> ProjectedAdamW:
    return rsvd(model, rank)


def _fraction(share: float, model: nn.Module) -> ProjectedAdamW:
    return rsvd_adam(model.parameters(), rank_fraction=share)


def _fixed(rank: int, model: nn.Module) -> ProjectedAdamW:
    return rsvd_adam(model.parameters(), rank=FixedRank(rank, clip=True))


def _galore(rank: int, side: str, model: nn.Module) -> ProjectedAdamW:
    # The source's rule of ranks, on the other side.
    return galore(model.parameters(), rank=FractionRank(rank / WIDTH), side=side, projector="randomized")


def _own(rank: int, model: nn.Module) -> ProjectedAdamW:
    return ProjectedAdamW(model.parameters(), rank=FractionRank(rank / WIDTH))


def measured_state(make: Any, seed: int = 0) -> dict[str, int]:
    """Bytes by key of the live state after one step on made-up gradients."""
    model = DistilBertShapes()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer = make(model)
    optimizer.step()
    return state_bytes(optimizer)


def run_optimizer_memory(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study optimizer_memory",
    say: Say = print,
) -> dict[str, Any]:
    """Optimizer state on DistilBERT's shapes: predicted from shapes, and summed over live tensors.

    Args:
        out: folder for ``table.md``, ``optimizer_memory.csv``, ``data.json`` and ``optimizer_memory.png``.
        quick: measure rSVDAdam and Adam only; the others are predicted.
        seed: of the made-up gradients; memory does not depend on it.
        data_dir: not used.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The table.
    """
    say(f"{len(optimizers())} optimizers on 66,955,010 numbers; about {'1' if quick else '3'} minutes on two cores")
    with torch.device("meta"):
        hollow = DistilBertShapes()
    adam = PUBLISHED_ADAM
    rows: list[dict[str, Any]] = []
    runs = Path("runs/study/optimizer_memory")
    with progress("Measuring", len(optimizers())) as step:
        for label, make in optimizers().items():
            parts: dict[str, int] = {}
            flops = None
            if label == "Adam":
                numbers = sum(parameter.numel() for parameter in hollow.parameters())
                predicted = 8 * numbers + 4 * len(list(hollow.parameters()))
            else:
                optimizer = make(hollow)
                predicted = sum(predicted_state_bytes(optimizer).values())
                flops = base_flops() + projection_flops(optimizer)
            measure = not quick or label == "Adam" or (label.startswith("rSVDAdam, rank") and "fraction" not in label)
            if measure:
                parts = remembered(runs, _file_name(label), {"seed": seed}, partial(measured_state, make, seed))
                gc.collect()
            measured = sum(parts.values()) if parts else None
            rows.append(
                {
                    "optimizer": label,
                    "predicted_bytes": predicted,
                    "measured_bytes": measured,
                    "measured_mib": None if measured is None else measured / 2**20,
                    "saving_percent": 100 * (1 - predicted / adam),
                    "published_bytes": _published(label),
                    "step_flops": flops,
                    "parts": parts,
                }
            )
            step(label)
    from isogrid import __version__

    result = {
        "title": "Optimizer memory on DistilBERT, 66,955,010 parameters",
        "command": command,
        "created": today(),
        "machine": describe_machine(__version__),
        "rows": rows,
    }
    write_json(result, out / "data.json")
    write_csv(
        [{key: value for key, value in row.items() if key != "parts"} for row in rows], out / "optimizer_memory.csv"
    )
    replace_file(out / "table.md", _markdown(result).encode())
    replace_file(out / "command.txt", f"{command}\n".encode())
    bars = {row["optimizer"]: row["parts"] for row in rows if row["parts"]}
    save_figure(stacked_bars(bars, title="Optimizer state by key"), out / "optimizer_memory.png")
    return read_json(out / "data.json")


def _file_name(label: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in label).lower()


def _published(label: str) -> int | None:
    if label == "Adam":
        return PUBLISHED_ADAM
    return PUBLISHED[int(label.split()[-1])] if label.startswith("rSVDAdam, rank") else None


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        f"# {result['title']}",
        "",
        "| Optimizer | State MiB | of it bytes | Published bytes | Saving against Adam | FLOPs of a step, 32 x 128 |",
        "| - | -: | -: | -: | -: | -: |",
    ]
    for row in result["rows"]:
        size = row["predicted_bytes"] if row["measured_bytes"] is None else row["measured_bytes"]
        lines.append(
            f"| {row['optimizer']}{' (predicted)' if row['measured_bytes'] is None else ''} | {size / 2**20:.4f} "
            f"| {size:,} | {'' if row['published_bytes'] is None else format(row['published_bytes'], ',')} "
            f"| {row['saving_percent']:.4f} % | {'' if row['step_flops'] is None else format(row['step_flops'], ',')} |"
        )
    machine = ", ".join(f"{key}: {value}" for key, value in result["machine"].items())
    return "\n".join(
        [
            *lines,
            "",
            "Bytes are summed over the live state tensors after one step. Step counters are Python numbers here and "
            "one float32 tensor a parameter in torch's Adam. The source's MB are MiB. FLOPs are the closed form of "
            "what the source's profiler counts, refreshes left out.",
            "",
            f"- {machine}, {result['created']}",
            "",
            f"    {result['command']}",
            "",
        ]
    )
