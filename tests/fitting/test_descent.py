"""The fit of last resort."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from isogrid import Format, LowRank, Metric
from isogrid.fitting import descend, low_rank, squared_norm
from tests.formats.cases import gaussian, ill_conditioned, metrics
from tests.toy_format import ShuffledGroups


def two_factors(factors: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ factors["right"].mT @ factors["left"].mT


def start(m: int, rank: int, n: int) -> dict[str, Tensor]:
    return {"left": gaussian(m, rank, seed=8), "right": gaussian(rank, n, seed=9)}


def error_of(factors: dict[str, Tensor], target: Tensor, metric: Metric | None) -> float:
    return squared_norm(target - factors["left"] @ factors["right"], metric)


def test_reaches_the_optimum_of_low_rank() -> None:
    target = gaussian(7, 6)
    for metric in (None, ill_conditioned(6, condition=1e2)):
        found = descend(two_factors, start(7, 2, 6), {"left", "right"}, target, metric, steps=400)
        left, right = low_rank(target, metric, 2)
        least = squared_norm(target - left @ right, metric)
        assert error_of(found, target, metric) == pytest.approx(least, rel=1e-5)


def test_never_worse_than_its_start() -> None:
    target = gaussian(7, 6)
    for metric in metrics(6):
        left, right = low_rank(target, metric, 2)
        optimum = {"left": left, "right": right}
        before = error_of(optimum, target, metric)
        for steps in (1, 20, 60):
            assert error_of(
                descend(two_factors, optimum, set(optimum), target, metric, steps=steps), target, metric
            ) <= (before * (1 + 1e-12))


def test_never_worse_where_the_product_is_wild() -> None:
    # A product that overflows beside its start: the line search meets infinities and NaN.
    def wild(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ torch.exp(torch.exp(50 * factors["w"])).mT

    begin = {"w": torch.full((3, 4), -0.1, dtype=torch.float64)}
    target = torch.full((3, 4), 1e6, dtype=torch.float64)
    found = descend(wild, begin, {"w"}, target, None)
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.isfinite(found["w"]).all()
    assert (wild(found, eye).T - target).norm() <= (wild(begin, eye).T - target).norm()


def test_returns_the_best_met_when_the_product_breaks_down() -> None:
    target, begin = gaussian(7, 6), start(7, 2, 6)
    for healthy in (1, 2, 30):
        calls = 0

        def breaking(factors: dict[str, Tensor], x: Tensor, healthy: int = healthy) -> Tensor:
            nonlocal calls
            calls += 1
            return two_factors(factors, x) * (1 if calls <= healthy else torch.nan)

        found = descend(breaking, begin, {"left", "right"}, target, None, steps=100)
        assert torch.isfinite(found["left"]).all()
        assert error_of(found, target, None) <= error_of(begin, target, None)


def test_moves_only_what_is_trainable_and_leaves_the_start_alone() -> None:
    begin = start(7, 2, 6) | {"order": torch.arange(6)}
    copies = {name: value.clone() for name, value in begin.items()}
    target = gaussian(7, 6)
    found = descend(two_factors, begin, {"left"}, target, None)
    assert all(torch.equal(begin[name], copies[name]) for name in begin)
    assert torch.equal(found["right"], begin["right"])
    assert torch.equal(found["order"], begin["order"])
    assert not any(value.requires_grad for value in found.values())
    least = torch.linalg.lstsq(begin["right"].T, target.T).solution.T  # one factor alone is least squares
    assert torch.allclose(found["left"], least, atol=1e-6)


def test_runs_where_gradients_are_switched_off() -> None:
    target = gaussian(7, 6)
    with torch.no_grad():
        quiet = descend(two_factors, start(7, 2, 6), {"left", "right"}, target, None)
    loud = descend(two_factors, start(7, 2, 6), {"left", "right"}, target, None)
    assert torch.equal(quiet["left"], loud["left"])


def test_reports_its_steps() -> None:
    target, metric = gaussian(7, 6), ill_conditioned(6, condition=1e2)
    log: list[tuple[int, float]] = []
    found = descend(
        two_factors,
        start(7, 2, 6),
        {"left", "right"},
        target,
        metric,
        steps=70,
        tolerance=0.0,
        on_step=lambda step, value: log.append((step, value)),
    )
    assert [step for step, _ in log][:2] == [0, 20]
    assert log[-1][0] <= 70
    values = [value for _, value in log]
    assert values[0] == pytest.approx(error_of(start(7, 2, 6), target, metric), rel=1e-9)
    assert values[-1] == pytest.approx(error_of(found, target, metric), rel=1e-6)
    assert all(later <= before for before, later in pairwise(values))


def test_takes_no_more_steps_than_asked() -> None:
    target = gaussian(12, 14)
    calls = 0

    def counting(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return two_factors(factors, x)

    log: list[int] = []
    descend(
        counting, start(12, 3, 14), {"left", "right"}, target, None, steps=5, on_step=lambda step, _: log.append(step)
    )
    assert log[-1] == 5
    assert calls <= 2 + 5 * 5 / 4 + 1, "iterations, their line searches, and the looks at the result"


def test_the_format_with_no_solver_of_its_own_improves_a_start() -> None:
    fmt, target = ShuffledGroups(width=2), gaussian(8, 9)
    rough = fmt.fit(target, steps=20)
    begin = {name: value.clone() for name, value in rough.items()}
    finer = fmt.fit(target, start=rough, steps=100)
    errors = [squared_norm(target - fmt.dense(factors, 8, 9), None) for factors in (rough, finer)]
    assert errors[1] <= errors[0]
    assert all(torch.equal(rough[name], begin[name]) for name in rough)
    several = fmt.fit(target, steps=20, restarts=4)
    assert squared_norm(target - fmt.dense(several, 8, 9), None) <= errors[0]
    with pytest.raises(ValueError, match="factors are"):
        fmt.fit(target, start={"left": torch.zeros(2, 2)})


def test_base_solver_on_a_format_that_has_its_own() -> None:
    # The default solver serves any format: here it must come near the closed form.
    target = gaussian(6, 5)
    found = Format.solve(
        LowRank(rank=2),
        target,
        None,
        solver="descent",
        start=None,
        generator=torch.Generator(),
        on_step=None,
        steps=300,
    )
    left, right = low_rank(target, None, 2)
    assert error_of(found, target, None) == pytest.approx(squared_norm(target - left @ right, None), rel=1e-4)
