"""Seconds of exact block descent until within 3 % of where ARMOR's published loop ends, beside the loop's own.

    python benchmarks/armor_speed.py [side]

The problem is square and synthetic: Gaussian plus low rank, rows of unequal size, log-normal input powers; blocks of 8.
"""

from __future__ import annotations

import sys
import time

import torch

from isogrid import Metric
from isogrid.fitting import Kept, Pattern, normalized, pruned
from isogrid.fitting.armor import error_of, published_loop
from isogrid.fitting.wrapped_core import fit_wrapped_core, plain_core

side = int(sys.argv[1]) if len(sys.argv) > 1 else 128
source = torch.Generator().manual_seed(0)
f64 = torch.float64
weight = torch.randn(side, side, generator=source, dtype=f64)
left, right = (torch.randn(*size, generator=source, dtype=f64) for size in ((side, 8), (8, side)))
weight = (weight + 0.5 * left @ right / 8**0.5) * (0.5 + torch.rand(side, 1, generator=source, dtype=f64))
power = torch.exp(torch.randn(side, generator=source, dtype=f64))
target, _, _ = normalized(weight)
_, mask = pruned(weight, Metric(torch.diag(power)), Kept(keep=2, of=4), "nowag", 0.0)
start = plain_core(target * mask, mask, 8)
whole = float((power * target.square()).sum())

begun = time.perf_counter()
steps = 0


def count(step: int, _: float) -> None:
    global steps
    steps = step


loop = published_loop(
    target, power, start, Pattern(2, 4), iterations=20_000, generator=torch.Generator().manual_seed(0), on_step=count
)
of_loop, reached = time.perf_counter() - begun, error_of(target, power, loop) / whole
print(f"published loop: {reached:.5f} after {steps} iterations, {of_loop:.1f} s")

begun = time.perf_counter()
near: list[tuple[int, float, float]] = []


def tell(step: int, error: float) -> None:
    if not near and error / whole <= 1.03 * reached:
        near.append((step, error / whole, time.perf_counter() - begun))


fit_wrapped_core(target, torch.diag(power), start, Pattern(2, 4), rounds=400, tolerance=0.0, on_step=tell)
if near:
    step, error, seconds = near[0]
    print(
        f"block descent: {error:.5f} after {step} rounds, {seconds:.1f} s: {seconds / of_loop:.3f} of the loop's time"
    )
else:
    print("block descent: not within 3 % in 400 rounds")
