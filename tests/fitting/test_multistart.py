import itertools

import pytest
import torch

from isogrid.fitting import squared_norm
from isogrid.fitting.multistart import affordable_starts, fit_multistart
from tests.formats.cases import gaussian, generator, ill_conditioned


def two_factors(factors, rows):
    return rows @ factors["right"].mT @ factors["left"].mT


def branching(factors, rows):
    """The same product with a branch on numbers, which vmap can't follow."""
    return two_factors(factors, rows) if factors["left"].sum() > -1e300 else rows


def search(multiply, target, metric, *, starts=16, start=None, **options):
    source = generator(3)

    def draw():
        return {
            "left": torch.randn(target.shape[0], 3, generator=source, dtype=torch.float64),
            "right": torch.randn(3, target.shape[1], generator=source, dtype=torch.float64),
        }

    found = fit_multistart(multiply, draw, ["left", "right"], target, metric, start=start, starts=starts, **options)
    return found, squared_norm(target - found["left"] @ found["right"], metric)


@pytest.mark.parametrize("multiply", [two_factors, branching])
def test_the_truncated_svd_is_found_from_the_product_alone(multiply):
    target, metric = gaussian(7, 9), ill_conditioned(9)
    _, reached = search(multiply, target, metric)
    tail = torch.linalg.svdvals(target @ metric.root)[3:].square().sum()
    assert reached == pytest.approx(float(tail), rel=1e-6)


def test_a_start_is_never_made_worse_and_its_descent_never_rises():
    target = gaussian(7, 9)
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    optimum = {"left": u[:, :3] * s[:3], "right": vh[:3]}
    told = []
    _, reached = search(two_factors, target, None, starts=8, start=optimum, on_step=lambda *step: told.append(step))
    assert reached <= float(s[3:].square().sum()) * (1 + 1e-12)
    assert told[0][0] == 0
    assert all(after[1] <= before[1] for before, after in itertools.pairwise(told))
    assert told[-1][1] == pytest.approx(reached, rel=1e-9)


def test_what_is_not_trained_stays_that_of_the_start():
    order = torch.tensor([2, 0, 1, 3])

    def permuted(factors, rows):
        return rows[:, factors["order"]] @ factors["full"].mT

    def draw():
        return {"full": gaussian(5, 4, seed=8), "order": torch.arange(4)}

    target = gaussian(5, 4)
    found = fit_multistart(
        permuted, draw, ["full"], target, None, start={"full": gaussian(5, 4, seed=9), "order": order}, starts=8
    )
    assert torch.equal(found["order"], order)
    torch.testing.assert_close(found["full"], target[:, order], atol=1e-5, rtol=0)


def test_a_target_of_zero_is_reached():
    _, reached = search(two_factors, torch.zeros(7, 9, dtype=torch.float64), None, starts=8)
    assert reached < 1e-12


def test_large_problems_get_no_starts_and_small_ones_many():
    assert affordable_starts(12 * 16, 132) == 160
    assert affordable_starts(2048, 1024) == 0
    assert 0 < affordable_starts(1024, 256) < 160
