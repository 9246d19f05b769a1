"""The first experiment of the thesis: how near each format comes to a random matrix, against its parameters.

One 1296 x 1296 Gaussian matrix, every format at the published sizes; beside each error the published one (Camenisch
2025, one draw; absolute errors divided by 1296, the expected norm). The draw matters in the third digit only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isogrid.formats import (
    Blast,
    BlockTensorTrain,
    Format,
    Kronecker,
    LowRank,
    LowRankLight,
    TensorTrain,
    Unstructured,
)
from isogrid.report import describe_machine, format_duration, progress, today, write_report
from isogrid.studies.rows import Say, remembered

SIDE = 1296

# Published absolute errors (Frobenius) of one matrix of norm about 1296, by size.
LOW_RANK = {16: 1264.98, 64: 1180.33, 128: 1076.32, 256: 887.58, 384: 718.91}
LIGHT = {16: 1264.98, 64: 1182.22, 128: 1078.27, 256: 888.41, 384: 721.94, 512: 570.04, 768: 315.45, 1024: 122.77}
BLOCK_TRAIN = {1: 1227.78, 2: 1165.02, 4: 1048.37, 7: 889.34, 9: 791.78, 12: 655.73, 15: 531.14}
MONARCH = {36: 1227.78, 24: 1224.49, 16: 1215.04, 8: 1177.98, 4: 1092.57, 3: 1030.98, 2: 893.11}
BLAST = {
    4: {16: 1262.87, 64: 1165.16, 256: 776.00},
    8: {16: 1262.57, 64: 1158.26, 256: 742.84},
    12: {16: 1257.78, 64: 1145.73, 256: 706.94, 480: 229.12},
}
TRAIN = {64: 1180.11, 256: 887.11}
KRONECKER = {36: 1293.58, 12: 1290.06, 8: 1284.54, 4: 1254.04, 2: 1122.13}
UNSTRUCTURED = {0.01: 1239.53, 0.1: 969.91, 0.3: 603.07, 0.5: 346.13, 0.75: 118.64}


def members(*, quick: bool) -> Iterator[tuple[str, Format, float, dict[str, Any]]]:
    """(label, member, published relative error, options of the fit)."""
    for rank, error in LOW_RANK.items():
        yield "Low rank", LowRank(rank), error / SIDE, {}
    for rank, error in LIGHT.items():
        yield "Low-Rank Light", LowRankLight(rank), error / SIDE, {}
    for rank, error in BLOCK_TRAIN.items():
        yield "Block Tensor-Train", BlockTensorTrain(rank), error / SIDE, {}
    for blocks, error in MONARCH.items():
        # The thesis' rank-one Monarch: a grid of slices with `blocks` rows and SIDE / blocks columns.
        pair = SIDE // blocks
        grid = BlockTensorTrain(1, out_factors=(pair, blocks), in_factors=(blocks, pair))
        yield "Monarch (rank one)", grid, error / SIDE, {}
    for rank, error in TRAIN.items():
        yield "Tensor train", TensorTrain(rank), error / SIDE, {}
    for first, error in KRONECKER.items():
        second = SIDE // first
        single = Kronecker(1, out_factors=(first, second), in_factors=(first, second))
        yield "Kronecker", single, error / SIDE, {}
    for density, error in UNSTRUCTURED.items():
        yield "Unstructured", Unstructured(density), error / SIDE, {}
    for blocks, sizes in BLAST.items():
        for rank, error in sizes.items():
            if quick and rank > 64:
                continue
            options = {"sweeps": 100 if quick else 300, "polish": 0, "restarts": 1}
            yield f"BLAST {blocks} x {blocks}", Blast(rank, blocks), error / SIDE, options


def run_random_projection(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study random_projection",
    say: Say = print,
) -> dict[str, Any]:
    """Project one Gaussian matrix into every format at the published sizes.

    Args:
        out: folder for the table. Rows are kept in ``runs/study/random_projection`` and not measured again.
        quick: BLAST at the two smallest ranks and with fewer sweeps.
        seed: of the matrix and the fits.
        data_dir: not used; the matrix is drawn.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table; ``quality`` is the relative error, ``reference`` the published one.
    """
    target = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = float(target.norm())
    todo = list(members(quick=quick))
    say(f"{len(todo)} members on a {SIDE} x {SIDE} matrix; about {'2' if quick else '10'} minutes on two cores")
    settings = {"target": f"{SIDE} x {SIDE}, independent standard normal", "seed": seed}
    runs = Path("runs/study/random_projection")

    def measure(label: str, fmt: Format, reference: float, options: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()
        factors = fmt.fit(target, generator=torch.Generator().manual_seed(seed), **options)
        seconds = time.perf_counter() - begun
        cost = fmt.cost(SIDE, SIDE)
        return {
            "label": label,
            "format": fmt.name,
            "calibrated": False,
            "requested_keep": None,
            "achieved_keep": cost.parameters / SIDE**2,
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "quality": float((target - fmt.dense(factors, SIDE, SIDE)).norm()) / norm,
            "reference": reference,
            "seconds": seconds,
        }

    rows = []
    with progress("Projecting", len(todo)) as step:
        for label, fmt, reference, options in todo:
            key = fmt.label().translate(str.maketrans("(), =[]", "-------"))
            row = remembered(
                runs, key, settings | {"options": options}, partial(measure, label, fmt, reference, options)
            )
            rows.append(row)
            step(label)
            ratio = row["quality"] / reference
            say(f"{fmt.label()}: {row['quality']:.4f}, {ratio:.4f} of the published, {format_duration(row['seconds'])}")
    from isogrid import __version__

    worst = max(rows, key=lambda row: row["quality"] / row["reference"])
    result = {
        "title": "How near each format comes to a Gaussian matrix",
        "command": command,
        "created": today(),
        "machine": describe_machine(__version__),
        "settings": settings,
        "quality": {"name": "relative error", "better": "lower"},
        "dense": {
            "label": "Dense",
            "format": "dense",
            "calibrated": False,
            "achieved_keep": 1.0,
            "parameters": SIDE**2,
            "bytes": 4 * SIDE**2,
        },
        "rows": rows,
        "notes": [
            "Published: errors of one other draw, divided by its expected norm; weak solvers among them.",
            f"Largest error beside the published one: {worst['label']}, "
            f"{worst['quality'] / worst['reference']:.4f} of it; theory of the low-rank tail at half rank: "
            f"{_marchenko_pastur(0.5):.4f}.",
        ],
    }
    write_report(result, out)
    return result


def _marchenko_pastur(fraction: float, points: int = 200_000) -> float:
    """Relative error of the best approximation of a large square Gaussian matrix by the given fraction of its rank."""
    s = (torch.arange(points, dtype=torch.float64) + 0.5) * (2 / points)
    density = (4 - s**2).sqrt() / math.pi * (2 / points)  # of the singular values, scaled by the root of the side
    below = density.cumsum(0) <= 1 - fraction
    return math.sqrt(float((density * s**2)[below].sum()))
