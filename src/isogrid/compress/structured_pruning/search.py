"""How many structures each module keeps: the least loss within a time.

A knapsack over measured times (SPDY, Frantar & Alistarh 2022, arXiv 2201.13096; its dynamic program with times rounded
up) finds the best sizes for given costs. What costs are is the question: the relative errors of modules say nothing of
what they mean to the model. So the model is asked: with one module at a time cut to a probe's size, how much does its
output change? Between probes costs follow the module's own error curve. Then the costs are perturbed at random, as SPDY
does, and every set of sizes that comes of it is judged by the whole model's change; the best one judged is taken.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from isogrid.compress.allocate import choose
from isogrid.compress.structured_pruning.times import SavedTimes
from isogrid.errors import BudgetError, IsogridError

NANOSECONDS = 1_000_000  # of a millisecond
Units = dict[str, int]
Judge = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Level:
    """One size of a module.

    Attributes:
        units: structures kept.
        cost: nanoseconds above its fastest size.
        error: what it adds to the loss.
    """

    units: int
    cost: int
    error: float


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        units: structures kept, by module.
        loss: the judge's, of it; None where nothing was judged.
        first: the judge's, of the best sizes before any perturbation; None likewise.
        judged: how many sets of sizes were judged, probes among them.
    """

    units: Units
    loss: float | None = None
    first: float | None = None
    judged: int = 0


def require_speedup(speedup: float) -> None:
    """Raise IsogridError for a speedup that is none."""
    if not (isinstance(speedup, int | float) and math.isfinite(speedup) and speedup > 1):
        raise IsogridError(f"a speedup is above 1, got {speedup!r}; 1.5 asks for two thirds of the time")


# What an answer that is not finite counts for: more than any that is.
WORST = 1e6


def solve(errors: Mapping[str, Mapping[int, float]], times: SavedTimes, speedup: float) -> Units:
    """The sizes of the least sum of errors within a time; exact, times rounded up to a 50,000th of the budget.

    Args:
        errors: by module and size.
        times: of the same modules and sizes.
        speedup: of the whole model, above 1.

    Raises:
        BudgetError: no sizes are that fast; the message names the largest speedup that there is.
        IsogridError: a speedup that is none.
    """
    require_speedup(speedup)
    options: dict[str, list[Level]] = {}
    floor = times.base
    for name, of in errors.items():
        saved = times.saved[name]
        fastest = max(saved[units] for units in of)
        floor -= fastest
        options[name] = [
            Level(units, math.ceil((fastest - saved[units]) * NANOSECONDS), error) for units, error in of.items()
        ]
    budget = math.floor((times.base / speedup - floor) * NANOSECONDS)
    if budget < 0:
        most = times.base / floor if floor > 0 else math.inf
        raise BudgetError(
            f"a speedup of {speedup:g} can't be reached: with the fastest size of every module the model takes "
            f"{floor:.3g} of {times.base:.3g} ms, a speedup of {math.floor(100 * most) / 100:g}; ask for less, or "
            "prune more modules"
        )
    try:
        return {name: level.units for name, level in choose(options, budget).items()}
    except BudgetError:  # rounding up left nothing of a budget that just holds the fastest sizes
        return {name: min(of, key=lambda level: (level.cost, level.error)).units for name, of in options.items()}


def probed(
    curves: Mapping[str, Mapping[int, float]], probes: Mapping[str, Sequence[int]], judge: Judge
) -> tuple[dict[str, dict[int, float]], int]:
    """Costs of sizes by what the whole model says of each module alone.

    Args:
        curves: relative errors by module and size, falling with the size.
        probes: by module, sizes to ask the model for.
        judge: the model's loss with some modules cut, the others dense.

    Returns:
        Costs by module and size, and how many sets were judged.
    """
    found: dict[str, dict[int, float]] = {}
    asked = 0
    for name, curve in curves.items():
        points: list[tuple[float, float]] = []  # (relative error, ratio of loss to it)
        for units in probes[name]:
            if curve[units] > 0:
                points.append((curve[units], min(max(judge({name: units}), 0.0), WORST) / curve[units]))
                asked += 1
        found[name] = {units: error * _ratio(points, error) for units, error in curve.items()}
    return found, asked


def _ratio(points: Sequence[tuple[float, float]], error: float) -> float:
    """Piecewise linear between points, constant outside; 1 without any."""
    points = sorted(points)
    if not points:
        return 1.0
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        if low <= error <= high and high > low:
            return at_low + (at_high - at_low) * (error - low) / (high - low)
    return points[0][1] if error < points[0][0] else points[-1][1]


def search(
    bases: Sequence[Mapping[str, Mapping[int, float]]],
    times: SavedTimes,
    speedup: float,
    judge: Judge,
    *,
    trials: int = 32,
    seed: int = 0,
) -> Found:
    """The best sizes that are found within a time.

    Args:
        bases: costs by module and size; several are tried, the best one is perturbed.
        times: of the same modules and sizes.
        speedup: of the whole model.
        judge: the model's loss with modules cut to sizes.
        trials: perturbed sets that are judged.
        seed: of the perturbations.

    Raises:
        BudgetError: see `solve`.
    """
    starts = [solve(base, times, speedup) for base in bases]
    known: dict[tuple[int, ...], float] = {}

    def value(units: Units) -> float:
        key = tuple(units.values())
        if key not in known:
            known[key] = judge(units)
        return known[key]

    base, best = min(zip(bases, starts, strict=True), key=lambda pair: value(pair[1]))
    first = value(best)
    random = torch.Generator().manual_seed(seed)
    names = list(base)
    factors = torch.zeros(len(names), dtype=torch.float64)  # logarithms
    tries, limit = 0, len(known) + trials
    while len(known) < limit and tries < 10 * trials:
        # From a tenth of all modules down to one, larger steps first (SPDY's local search).
        count = max(round(0.1 * len(names) * (1 - tries / (10 * trials))), 1)
        moved = factors.clone()
        some = torch.randperm(len(names), generator=random)[:count]
        moved[some] += torch.randn(count, generator=random, dtype=torch.float64)
        tries += 1
        scaled = {
            name: {units: error * math.exp(factor) for units, error in base[name].items()}
            for name, factor in zip(names, moved.tolist(), strict=True)
        }
        units = solve(scaled, times, speedup)
        if value(units) < value(best):
            best, factors = units, moved
    return Found(best, value(best), first, len(known))
