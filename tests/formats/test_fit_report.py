"""Reports of fits: the objective is the factors', and no factors whatever go below the bound."""

from __future__ import annotations

import pytest
import torch

from isogrid import Blast, BlockTensorTrain, Format, LowRank, Metric, Monarch
from isogrid.fitting import squared_norm
from tests.formats.cases import fit_cases, gaussian, ill_conditioned, over, random_factors
from tests.formats.test_known_answers import theory


@over(fit_cases(((10, 12), (13, 7))))
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
def test_objective_is_that_of_the_factors_and_bounds_hold(fmt: Format, m: int, n: int, weighted: bool) -> None:
    target = gaussian(m, n, seed=5)
    metric = ill_conditioned(n, seed=5) if weighted else None
    seen: list[tuple[int, float]] = []
    factors, report = fmt.fit_and_report(target, metric, on_step=lambda *told: seen.append(told))
    again = fmt.fit(target, metric)
    assert all(torch.equal(factors[name], again[name]) for name in factors)
    assert report.objective == pytest.approx(squared_norm(target - fmt.dense(factors, m, n), metric), rel=1e-9)
    assert report.whole == pytest.approx(squared_norm(target, metric), rel=1e-12)
    assert report.error == pytest.approx((report.objective / report.whole) ** 0.5)
    assert report.iterations == (seen[-1][0] if seen else 0)
    if report.lower_bound is not None:
        assert report.least_error is not None
        assert 0 <= report.least_error <= report.error
    # The bound of the format alone, not cut to what the fit reached.
    bound = fmt.lower_bound(target, metric)
    if bound is not None:
        assert bound <= report.objective * (1 + 1e-9)
        member = fmt.dense(random_factors(fmt, m, n, seed=1), m, n)
        assert fmt.lower_bound(member, metric) == pytest.approx(0, abs=1e-16 * squared_norm(member, metric))


@pytest.mark.parametrize("fmt", [Monarch(4, rank=1), BlockTensorTrain(1), Monarch(3)], ids=str)
def test_bounds_of_slices_are_met_without_a_metric(fmt: Format) -> None:
    target = gaussian(12, 15, seed=1)
    _, report = fmt.fit_and_report(target)
    assert fmt.lower_bound(target, None) == pytest.approx(report.objective, rel=1e-10)


def test_documented_bound_of_blast() -> None:
    w, metric = theory()["W"], Metric(theory()["C"])
    assert Blast(2, 4).lower_bound(w, metric) == pytest.approx(4.235403, abs=1e-6)


def test_the_optimum_is_its_own_bound_also_in_half_precision() -> None:
    target, metric = gaussian(20, 16), ill_conditioned(16)
    exact = LowRank(4).fit_and_report(target, metric)[1]
    assert exact.lower_bound == exact.objective
    assert exact.iterations == 0
    rounded = LowRank(4).fit_and_report(target.bfloat16(), metric)[1]
    assert rounded.lower_bound is not None
    assert rounded.objective > rounded.lower_bound
    assert rounded.lower_bound == pytest.approx(exact.objective, rel=0.05)


def test_a_target_of_zeros_has_no_error() -> None:
    _, report = Monarch().fit_and_report(torch.zeros(8, 8, dtype=torch.float64))
    assert report.error == 0
    assert report.least_error == 0
    assert report.to_dict()["whole"] == 0
