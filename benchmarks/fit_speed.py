"""Time of fits at the size of real layers: a metric-aware BLAST fit, and slice projections against a loop of SVDs.

    python benchmarks/fit_speed.py

Ratios are medians of interleaved runs in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from isogrid import Blast, BlockTensorTrain, Budget, Format, Metric, Monarch

OUT, IN = 1536, 576
REPEATS = 7


def looped(blocks: Tensor, rank: int) -> Tensor:
    """The published way: one SVD per slice ``(A, C, s, p)``, one after the other."""
    found = torch.empty_like(blocks)
    for a in range(blocks.shape[0]):
        for c in range(blocks.shape[1]):
            u, sigma, vh = torch.linalg.svd(blocks[a, c], full_matrices=False)
            found[a, c] = (u[:, :rank] * sigma[:rank]) @ vh[:rank]
    return found


def slices_of(fmt: Format, matrix: Tensor) -> tuple[Tensor, int]:
    """The grid of slices that a format's projection cuts a matrix into, and their rank."""
    if isinstance(fmt, Monarch):
        assert fmt.rank is not None
        b = fmt.blocks
        return matrix.view(OUT // b, b, b, IN // b).permute(1, 2, 0, 3), fmt.rank
    assert isinstance(fmt, BlockTensorTrain)
    n0, n1, m1, m0 = fmt.grid(OUT, IN)
    return matrix.view(n0, n1, m1, m0).transpose(1, 2), fmt.rank


def seconds(run: Callable[[], object]) -> float:
    """Time of one run."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(OUT, IN, generator=source)
    rows = torch.randn(8192, IN, generator=source) * torch.logspace(0, -2, IN)
    print(f"{OUT} x {IN}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    half = Budget.keep(0.5, OUT, IN)
    blast = Blast(blocks=16).sized(OUT, IN, half)
    metric = Metric.from_rows(rows)
    begun = time.perf_counter()
    _, report = blast.fit_and_report(matrix, metric)
    print(f"{blast.label()} under a metric: {time.perf_counter() - begun:.1f} s, relative error {report.error:.4f}")

    for fmt in (Monarch(16, rank=8), Monarch(32, rank=4), BlockTensorTrain(2), BlockTensorTrain(6)):
        wide = matrix.double()
        blocks, rank = slices_of(fmt, wide)
        ours, theirs = [], []
        for _ in range(REPEATS):
            ours.append(seconds(lambda fmt=fmt: fmt.fit(matrix)))
            theirs.append(seconds(lambda blocks=blocks, rank=rank: looped(blocks, rank)))
        one, other = statistics.median(ours), statistics.median(theirs)
        print(
            f"{fmt.label()}: {blocks.shape[0] * blocks.shape[1]} slices {blocks.shape[2]} x {blocks.shape[3]}, "
            f"fit {1000 * one:.0f} ms, loop of SVDs {1000 * other:.0f} ms: {other / one:.1f} times faster"
        )


if __name__ == "__main__":
    main()
