"""The default fit, on formats that have better ones: from factors and product alone it has to come as near."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from isogrid import Blast, BlockTensorTrain, Format, IsogridError, Kronecker, LowRank, Metric, Monarch
from isogrid.fitting import alternating_least_squares, squared_norm
from isogrid.formats import new_factors
from tests.formats.cases import gaussian, generator, ill_conditioned
from tests.formats.test_known_answers import theory


def plain(fmt: Format, target, metric, **options):
    """The error of the base class's fit of a format, whatever the format's own is."""
    factors = Format.solve(
        fmt, target, metric, start=None, generator=generator(0), on_step=None, **({"solver": "default"} | options)
    )
    return squared_norm(target - fmt.dense(factors, *target.shape), metric)


@pytest.mark.parametrize("seed", range(5))
def test_low_rank_comes_within_a_percent_of_the_optimum(seed):
    target, metric = gaussian(12, 16, seed=seed), ill_conditioned(16, seed=seed)
    own = LowRank(4).fit(target, metric)
    optimum = squared_norm(target - LowRank(4).dense(own, 12, 16), metric)
    assert plain(LowRank(4), target, metric, restarts=3) <= 1.01 * optimum


@pytest.mark.parametrize("fmt", [Monarch(4, rank=1), BlockTensorTrain(1)], ids=str)
def test_slices_come_near_their_own_descent(fmt):
    target, metric = gaussian(12, 16, seed=1), ill_conditioned(16, seed=1)
    own = fmt.fit(target, metric, sweeps=100, tolerance=1e-9)
    reached = squared_norm(target - fmt.dense(own, 12, 16), metric)
    assert plain(fmt, target, metric, restarts=5) <= 1.01 * reached


def test_alternation_never_rises_and_solves_one_factor_exactly():
    fmt, target, metric = Monarch(4, rank=2), gaussian(16, 20, seed=2), ill_conditioned(20, seed=2)
    begin = new_factors(fmt, 16, 20, dtype=torch.float64)
    fmt.initialize(begin, 16, 20, generator(3))
    values = []
    found = alternating_least_squares(
        lambda factors, x: fmt.multiply(factors, x, 16),
        begin,
        ["right", "left"],
        target,
        metric,
        rounds=12,
        on_step=lambda _, value: values.append(value),
    )
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))
    assert values[-1] == pytest.approx(squared_norm(target - fmt.dense(found, 16, 20), metric), rel=1e-9)
    only = alternating_least_squares(
        lambda factors, x: fmt.multiply(factors, x, 16), begin, ["left"], target, metric, rounds=40, inner=60,
        tolerance=0.0,
    )  # fmt: skip
    gradient_of = only["left"].clone().requires_grad_()
    error = (target - fmt.dense(only | {"left": gradient_of}, 16, 20)) @ metric.root
    (gradient,) = torch.autograd.grad(error.square().sum(), gradient_of)
    assert gradient.norm() <= 1e-5 * target.norm() * metric.root.norm()


def test_a_format_that_is_not_linear_is_not_alternated():
    @dataclass(frozen=True)
    class Curved(LowRank):
        traits: ClassVar = Format.traits

    with pytest.raises(IsogridError, match="no solver 'alternating'"):
        plain(Curved(2), gaussian(4, 5), None, solver="alternating")
    assert plain(LowRank(4), gaussian(4, 5), Metric.from_rows(gaussian(9, 5)), solver="alternating") < 1e-6


@pytest.mark.parametrize("fmt", [Monarch(4, rank=1), BlockTensorTrain(1), LowRank(4)], ids=str)
def test_the_general_solver_never_ends_above_the_own_fit(fmt):
    target, metric = gaussian(12, 16, seed=4), ill_conditioned(16, seed=4)
    _, own = fmt.fit_and_report(target, metric)
    _, general = fmt.fit_and_report(target, metric, solver="general")
    assert general.objective <= own.objective * (1 + 1e-12)
    if fmt.traits.optimal_under_metric:
        assert general.objective == pytest.approx(own.objective, rel=1e-8)


@pytest.mark.parametrize(
    ("fmt", "best"),
    [
        (Kronecker(1, out_factors=(3, 4), in_factors=(4, 4)), 62.498557),
        (Kronecker(3, out_factors=(3, 4), in_factors=(4, 4)), 7.393650),
        (BlockTensorTrain(1, out_factors=(4, 3), in_factors=(4, 4)), 6.010469),
        (Blast(2, 4), 6.880575),
        pytest.param(Blast(4, 4), 0.773235, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_general_solver_finds_the_documented_best_of_many_restarts(fmt, best):
    known = theory()
    _, report = fmt.fit_and_report(known["W"], Metric(known["C"]), solver="general")
    assert report.objective <= best + 1e-6  # fitting theory 9, printed to six digits


def test_the_general_solver_recovers_a_planted_member():
    fmt = Blast(2, 3)
    factors = new_factors(fmt, 9, 12, dtype=torch.float64)
    fmt.initialize(factors, 9, 12, generator(1))
    target = fmt.dense(factors, 9, 12)
    _, report = fmt.fit_and_report(target, ill_conditioned(12), solver="general")
    assert report.error < 1e-6


def test_the_general_solver_takes_large_matrices_and_any_grad_mode():
    target, metric = gaussian(48, 64), ill_conditioned(64)
    _, own = BlockTensorTrain(1).fit_and_report(target, metric)
    with torch.inference_mode():
        _, general = BlockTensorTrain(1).fit_and_report(target, metric, solver="general")
        _, small = BlockTensorTrain(1).fit_and_report(target[:6, :8], None, solver="general")
    assert general.objective < 0.99 * own.objective
    assert small.objective == pytest.approx(small.lower_bound, rel=1e-6)
