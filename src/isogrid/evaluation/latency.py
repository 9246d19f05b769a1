"""Times of calls measured in turns, so that a busy machine disturbs them alike, and the memory a process needed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Time calls against each other: one of each in turn, again and again, the order reversed every other round.

    Args:
        calls: what to time, by name; on a GPU the time until its work is done is counted.
        repeats: timed rounds.
        warmup: rounds before them that aren't timed.

    Raises:
        IsogridError: nothing to time, no repeats, or a negative warm-up.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise IsogridError(
            f"interleaved_medians: {len(calls)} calls, repeats {repeats}, warmup {warmup}; "
            "there has to be a call and a repeat at least, and warmup is 0 or more"
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        # Reversed in turns, so that no call always runs in the caches that a certain other one leaves behind.
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            _wait_for_gpu()
            begun = time.perf_counter()
            calls[name]()
            _wait_for_gpu()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - begun))
    return {name: _timing(measured) for name, measured in times.items()}


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


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
