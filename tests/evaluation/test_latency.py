import re
import sys
import time
from contextlib import contextmanager
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest

from isogrid.errors import IsogridError
from isogrid.evaluation import (
    interleaved_medians,
    interleaved_times,
    median_interval,
    peak_memory_bytes,
    ratio_interval,
)
from isogrid.evaluation.latency import _timing


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcdefg"])
def test_calls_take_turns_and_the_warmup_is_not_timed(names):
    order: list[str] = []
    result = interleaved_medians({n: lambda n=n: order.append(n) for n in names}, repeats=60, warmup=1)
    rounds = ["".join(order[k : k + len(names)]) for k in range(0, len(order), len(names))]
    assert len(rounds) == 61
    assert {"".join(sorted(one)) for one in rounds} == {names}
    assert list(result) == list(names)
    assert {timing.repeats for timing in result.values()} == {60}
    pairs = set(pairwise(order))
    assert len(names) == 1 or all(one != other for one, other in pairs)
    assert len(names) == 1 or pairs == set(permutations(names, 2))  # each has run after each other


def test_times_are_milliseconds():
    result = interleaved_medians({"short": lambda: None, "long": lambda: time.sleep(0.02)}, repeats=3, warmup=0)
    assert 20 <= result["long"].median < 500
    assert result["short"].median < 10


def test_median_and_quartiles():
    timing = _timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.lower, timing.median, timing.upper, timing.repeats) == (2, 3, 4, 5)
    timing = _timing([7.0])
    assert (timing.lower, timing.median, timing.upper) == (7, 7, 7)


@pytest.mark.parametrize("options", [{"calls": {}}, {"repeats": 0}, {"warmup": -1}])
def test_bad_input(options):
    with pytest.raises(IsogridError, match="interleaved_times"):
        interleaved_medians(**{"calls": {"a": lambda: None}} | options)


def test_what_a_call_runs_in_is_not_timed():
    events = []

    @contextmanager
    def slow():
        events.append("in")
        time.sleep(0.02)
        yield
        events.append("out")

    calls = {"a": lambda: events.append("a"), "b": lambda: events.append("b")}
    times = interleaved_times(calls, repeats=2, warmup=0, within={"a": slow})
    assert events == ["in", "a", "out", "b", "in", "a", "out", "b"]
    assert max(times["a"]) < 20
    assert {len(measured) for measured in times.values()} == {2}


def test_a_ratio_of_medians_and_its_interval():
    found = ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found.value, found.lower, found.upper) == (2, 2, 2)  # in each round twice as long: nothing to doubt
    with pytest.raises(IsogridError, match="3 rounds against 2"):
        ratio_interval([1.0, 1.0, 1.0], [1.0, 1.0])
    with pytest.raises(IsogridError, match="0 rounds"):
        ratio_interval([], [])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    source = np.random.default_rng(0)
    held, alone = 0, 0
    for _ in range(200):
        shared = source.lognormal(0, 1.0, 31)  # what disturbs a round
        one, other = (1.2 * shared * source.lognormal(0, 0.1, 31), shared * source.lognormal(0, 0.1, 31))
        found = ratio_interval(one, other, resamples=300)
        held += found.lower <= 1.2 <= found.upper
        found = median_interval(one, resamples=300)
        alone += found.lower <= 1.2 <= found.upper
    assert 175 <= held <= 200
    assert 175 <= alone <= 200


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the same in another place")
def test_peak_memory_is_the_kernels_high_water_mark():
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak_memory_bytes() == pytest.approx(1024 * kibibytes, rel=0.02)
