import re
import sys
import time
from pathlib import Path

import pytest

from isogrid.errors import IsogridError
from isogrid.evaluation import interleaved_medians, peak_memory_bytes
from isogrid.evaluation.latency import _timing


def test_calls_take_turns_and_the_warmup_is_not_timed():
    order: list[str] = []
    result = interleaved_medians({n: lambda n=n: order.append(n) for n in "abc"}, repeats=3, warmup=1)
    assert "".join(order) == "abccbaabccba"
    assert list(result) == ["a", "b", "c"]
    assert {timing.repeats for timing in result.values()} == {3}


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
    with pytest.raises(IsogridError, match="interleaved_medians"):
        interleaved_medians(**{"calls": {"a": lambda: None}} | options)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the same in another place")
def test_peak_memory_is_the_kernels_high_water_mark():
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak_memory_bytes() == pytest.approx(1024 * kibibytes, rel=0.02)
