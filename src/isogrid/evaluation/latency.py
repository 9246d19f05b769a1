"""Times of calls measured in turns, so that a busy machine disturbs them alike, and the memory a process needed."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from isogrid.errors import IsogridError


@dataclass(frozen=True)
class Timing:
    """How long a call took, in milliseconds.

    Attributes:
        median: the middle of the repeats.
        lower: their first quartile.
        upper: their third quartile.
        repeats: how often the call was timed.
    """

    median: float
    lower: float
    upper: float
    repeats: int


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies with 95 % confidence.

    Attributes:
        value: the figure.
        lower: 2.5th percentile of its bootstrap distribution.
        upper: 97.5th percentile.
    """

    value: float
    lower: float
    upper: float


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """`interleaved_times`, of each call the median and quartiles."""
    times = interleaved_times(calls, repeats=repeats, warmup=warmup)
    return {name: _timing(measured) for name, measured in times.items()}


def interleaved_times(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, list[float]]:
    """Time calls against each other: one of each in turn, again and again, in an order drawn anew for every round.

    No call runs twice in a row, the last of a round and the first of the next included: it would find its own numbers
    in the cache, and the others not.

    Args:
        calls: what to time, by name; on a GPU the time until its work is done is counted.
        repeats: timed rounds.
        warmup: rounds before them that aren't timed.
        within: for some calls, what each runs in; entering and leaving it is not timed.

    Returns:
        Milliseconds of each call, round by round.

    Raises:
        IsogridError: nothing to time, no repeats, or a negative warm-up.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise IsogridError(
            f"interleaved_times: {len(calls)} calls, repeats {repeats}, warmup {warmup}; "
            "there has to be a call and a repeat at least, and warmup is 0 or more"
        )
    around = dict.fromkeys(calls, nullcontext) | dict(within or {})
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, source = list(calls), random.Random(0)
    for turn in range(warmup + repeats):
        if turn and len(order) > 1:  # so that no call always runs in the caches that a certain other one leaves behind
            last = order[-1]
            source.shuffle(order)
            if order[0] == last:
                order.append(order.pop(0))
        for name in order:
            with around[name]():
                wait_for_gpu()
                begun = time.perf_counter()
                calls[name]()
                wait_for_gpu()
                elapsed = time.perf_counter() - begun
            if turn >= warmup:
                times[name].append(1000 * elapsed)
    return times


def median_interval(times: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The median of a call's times, with its bootstrap interval (Efron 1979)."""
    return _bootstrap([times], lambda drawn: np.median(drawn[0], axis=-1), resamples, seed)


def ratio_interval(
    times: Sequence[float], against: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """How many times as long one call takes as another: the quotient of medians, with its paired bootstrap interval.

    Rounds are drawn whole, so that what disturbs both calls of a round widens nothing.

    Args:
        times: of the one, round by round, as `interleaved_times` gives them.
        against: of the other, in the same rounds.
        resamples: how often rounds are drawn.
        seed: of the drawing.

    Raises:
        IsogridError: not as many rounds of each.
    """
    if len(times) != len(against) or len(times) == 0:
        raise IsogridError(f"ratio_interval: {len(times)} rounds against {len(against)}; times come in pairs")
    return _bootstrap(
        [times, against], lambda drawn: np.median(drawn[0], axis=-1) / np.median(drawn[1], axis=-1), resamples, seed
    )


def _bootstrap(
    samples: Sequence[Sequence[float]], figure: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> Interval:
    together = np.array(samples)  # (calls, rounds)
    rounds = np.random.default_rng(seed).integers(together.shape[1], size=(resamples, together.shape[1]))
    lower, upper = np.percentile(figure(together[:, rounds]), (2.5, 97.5))
    return Interval(float(figure(together)), float(lower), float(upper))


def forget_peak_memory() -> bool:
    """Let `peak_memory_bytes` count from now on; False where the system can't (only Linux can)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """The most memory this process has held resident since it began or since `forget_peak_memory`, in bytes."""
    import resource  # absent on Windows, where the rest of this file works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def _timing(milliseconds: list[float]) -> Timing:
    median = statistics.median(milliseconds)
    if len(milliseconds) == 1:
        return Timing(median, median, median, 1)
    lower, _, upper = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(milliseconds))


def wait_for_gpu() -> None:
    """Until the GPU has done what it was given: only then has it taken its time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
