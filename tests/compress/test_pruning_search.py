import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isogrid import BudgetError, IsogridError
from isogrid.compress.structured_pruning import SavedTimes
from isogrid.compress.structured_pruning.search import probed, search, solve


def instance(seed, modules=4, levels=5):
    """Errors that fall and times that mostly do, as measured ones: (errors, times)."""
    draw = torch.Generator().manual_seed(seed)
    errors, saved = {}, {}
    for module in range(modules):
        of = torch.rand(levels, generator=draw, dtype=torch.float64).sort(descending=True).values.tolist()
        ms = (torch.rand(levels, generator=draw, dtype=torch.float64) * 3).sort(descending=True).values.tolist()
        if seed % 3 == 0:
            ms[1] = ms[0] + 0.1  # a larger size that is faster: a step of the processor's tiles
        errors[f"m{module}"] = dict(enumerate([*of[:-1], 0.0]))
        saved[f"m{module}"] = dict(enumerate([*ms[:-1], 0.0]))
    return errors, SavedTimes(20.0, saved)


def best_of_all(errors, times, speedup):
    names = list(errors)
    costs = [
        sum(errors[name][units] for name, units in zip(names, some, strict=True))
        for some in itertools.product(*(errors[name] for name in names))
        if times.predicted(dict(zip(names, some, strict=True))) <= times.base / speedup
    ]
    return min(costs, default=None)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), speedup=st.floats(1.02, 2.0))
def test_the_best_of_all_sizes_within_the_time(seed, speedup):
    errors, times = instance(seed)
    best = best_of_all(errors, times, speedup)
    if best is None:
        with pytest.raises(BudgetError, match="can't be reached"):
            solve(errors, times, speedup)
        return
    units = solve(errors, times, speedup)
    assert times.predicted(units) <= times.base / speedup + 1e-6  # a nanosecond's rounding of the budget
    # Times are rounded up: the sum may be that of a budget which is smaller by one unit for each module.
    slack = times.base / speedup * (1 - 4 / 25_000)
    assert sum(errors[name][kept] for name, kept in units.items()) <= (
        best_of_all(errors, times, times.base / slack) or math.inf
    )


def largest_speedup(times):
    return times.base / (times.base - sum(max(of.values()) for of in times.saved.values()))


def test_more_speed_never_costs_less():
    errors, times = instance(1)
    sums = []
    for speedup in (1.05, 1.1, 1.2, 1.3, largest_speedup(times) * 0.999):
        units = solve(errors, times, speedup)
        sums.append(sum(errors[name][kept] for name, kept in units.items()))
    assert sums == sorted(sums)


def test_the_largest_speedup_is_named_and_can_be_reached():
    errors, times = instance(2)
    most = largest_speedup(times)
    with pytest.raises(BudgetError) as raised:
        solve(errors, times, most * 1.01)
    named = float(
        str(raised.value).partition("a speedup of ")[2].partition("can't")[2].split("speedup of ")[1].split(";")[0]
    )
    assert named == math.floor(100 * most) / 100
    units = solve(errors, times, named)
    assert times.base / times.predicted(units) >= named
    assert times.base / times.predicted(solve(errors, times, most)) >= most * (1 - 1e-9)


@pytest.mark.parametrize("speedup", [1.0, 0.5, 0, -1, math.nan, math.inf, "2"])
def test_a_speedup_that_is_none(speedup):
    errors, times = instance(0)
    with pytest.raises(IsogridError, match="a speedup is above 1"):
        solve(errors, times, speedup)


def test_the_search_is_never_worse_than_the_first_sizes_and_finds_better():
    errors, times = instance(4, modules=8)
    draw = torch.Generator().manual_seed(0)
    worth = {name: float(torch.rand((), generator=draw)) for name in errors}
    asked = []

    def judge(units):
        asked.append(tuple(units.values()))
        return sum(worth[name] * errors[name][kept] ** 2 for name, kept in units.items())

    found = search([errors], times, 1.3, judge, trials=12, seed=1)
    assert found.first == judge(solve(errors, times, 1.3))
    assert found.loss == judge(found.units) < found.first
    assert times.predicted(found.units) <= times.base / 1.3 + 1e-6
    assert found.judged == len(set(asked))
    assert found == search([errors], times, 1.3, judge, trials=12, seed=1)
    assert search([errors], times, 1.3, judge, trials=0).loss == found.first


def test_several_costs_are_tried():
    errors, times = instance(5)
    flipped = {name: {units: float(units) for units in of} for name, of in errors.items()}
    judge = lambda units: sum(errors[name][kept] for name, kept in units.items())  # noqa: E731
    found = search([flipped, errors], times, 1.2, judge, trials=0)
    assert found.units == solve(errors, times, 1.2)


def test_probed_costs_are_what_the_judge_says_and_follow_the_curve_between():
    curves = {"a": {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.0}, "b": {0: 0.8, 4: 0.0}, "dead": {0: 0.0, 1: 0.0}}
    truth = {("a", 0): 3.0, ("a", 2): 0.25, ("b", 0): 0.1}
    costs, asked = probed(curves, {"a": [0, 2], "b": [0], "dead": [0]}, lambda units: truth[next(iter(units.items()))])
    assert asked == 3
    for (name, units), value in truth.items():
        assert costs[name][units] == pytest.approx(value)
    assert costs["a"][1] == pytest.approx(0.5 * (1 + (3 - 1) / 3))  # the ratio is a line in the error
    assert costs["a"][3] == 0
    assert costs["dead"] == {0: 0.0, 1: 0.0}
