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
    progress,
    save_figure,
    stacked_bars,
    write_csv,
)
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table

WIDTH, MLP, LAYERS, VOCABULARY, POSITIONS, CLASSES = 768, 3072, 6, 30522, 512, 2
RANKS = (4, 8, 16, 64, 128)
# Operations of the linear layers for one token, and of the head for one sentence.
LAYER_PRODUCTS = LAYERS * 2 * (4 * WIDTH**2 + 2 * WIDTH * MLP)
HEAD_PRODUCTS = 2 * (WIDTH**2 + CLASSES * WIDTH)
# Layers that are adapted or factored: q, k and v; elementwise products over token tensors in a dense step.
ADAPTED, ELEMENTWISE = 3 * LAYERS, 19
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
    return 3 * (tokens * LAYER_PRODUCTS + batch * HEAD_PRODUCTS) + ELEMENTWISE * tokens * WIDTH


def _frozen_flops(batch: int, length: int) -> int:
    """A step whose layers' weights take no gradient, nor do the inputs of the first q, k and v; the head trains."""
    tokens = batch * length
    layers = 2 * tokens * LAYER_PRODUCTS - 3 * 2 * tokens * WIDTH**2
    return layers + 3 * batch * HEAD_PRODUCTS + ELEMENTWISE * tokens * WIDTH


def _thin_flops(tokens: int) -> int:
    """Two thin products for each q, k and v, thrice, a rank; the first three inputs take no gradient."""
    return tokens * (3 * ADAPTED * 2 * (WIDTH + WIDTH) - 3 * 2 * WIDTH)


def lora_flops(rank: int, batch: int = 32, length: int = 128) -> int:
    """The source's step with LoRA on q, k and v of every layer.

    Beside the thin products, three elementwise products over tokens an adapter: scale and dropout.
    """
    tokens = batch * length
    return _frozen_flops(batch, length) + 3 * ADAPTED * tokens * WIDTH + _thin_flops(tokens) * rank


def materialized_flops(rank: int, batch: int = 32, length: int = 128) -> int:
    """The source's factored q, k and v, which multiplies ``A diag(C) B`` out in every step: more than dense training.

    The gradient of the product costs what that of a dense weight does; a product of ``2 d² r`` thrice comes on top.
    """
    weights = ADAPTED * 2 * batch * length * WIDTH**2
    return _frozen_flops(batch, length) + weights + ADAPTED * (3 * 2 * WIDTH**2 + 3 * WIDTH) * rank


def factors_flops(rank: int, batch: int = 32, length: int = 128) -> int:
    """The same factors as `isogrid.training.FactoredLinear` multiplies them: the thin products first."""
    tokens = batch * length
    # Of the dense q, k and v nothing is left: no forward product, and none with the inputs' gradient.
    dense = 2 * tokens * WIDTH**2 * (2 * ADAPTED - 3)
    return _frozen_flops(batch, length) - dense + (_thin_flops(tokens) + 3 * ADAPTED * tokens) * rank


def sentence_flops(tokens: int = 11) -> int:
    """The source's dense forward pass of one sentence."""
    return tokens * (LAYER_PRODUCTS + 13 * WIDTH) + HEAD_PRODUCTS


def flops_table(hollow: nn.Module) -> list[dict[str, Any]]:
    """FLOPs of one step of 32 x 128 tokens at every rank, refreshes left out."""
    return [
        {
            "rank": rank,
            "rsvd_adam": base_flops() + projection_flops(rsvd(hollow, rank)),
            "lora": lora_flops(rank),
            "factors_materialized": materialized_flops(rank),
            "factors": factors_flops(rank),
            "dense": base_flops(),
        }
        for rank in RANKS
    ]


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
        out: folder for ``table.md``, ``data.json``, ``optimizer_memory.csv``, ``flops.csv`` and
            ``optimizer_memory.png``.
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
    result = {
        **heading("Optimizer memory on DistilBERT, 66,955,010 parameters", command),
        "rows": rows,
    }
    write_csv(
        [{key: value for key, value in row.items() if key != "parts"} for row in rows], out / "optimizer_memory.csv"
    )
    write_csv(flops_table(hollow), out / "flops.csv")
    bars = {row["optimizer"]: row["parts"] for row in rows if row["parts"]}
    save_figure(stacked_bars(bars, title="Optimizer state by key"), out / "optimizer_memory.png")
    return write_table(result, _markdown(result), out)


def _file_name(label: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in label).lower()


def _published(label: str) -> int | None:
    if label == "Adam":
        return PUBLISHED_ADAM
    return PUBLISHED[int(label.split()[-1])] if label.startswith("rSVDAdam, rank") else None


def _markdown(result: dict[str, Any]) -> str:
    lines = [
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
    return table_page(
        result,
        lines,
        "Bytes are summed over the live state tensors after one step. Step counters are Python numbers here and "
        "one float32 tensor a parameter in torch's Adam. The source's MB are MiB. FLOPs are the closed form of "
        "what the source's profiler counts, refreshes left out.",
    )
