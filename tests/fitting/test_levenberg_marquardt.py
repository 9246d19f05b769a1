import itertools

import pytest
import torch

from isogrid.fitting import levenberg_marquardt as rooms
from isogrid.fitting.levenberg_marquardt import Points, levenberg_marquardt
from tests.formats.cases import gaussian


def valley(points: torch.Tensor) -> torch.Tensor:
    """Rosenbrock's function as residuals: a curved valley with its minimum, zero, at (1, 1)."""
    x, y = points.unbind(1)
    return torch.stack([10 * (y - x**2), 1 - x], 1)


def valley_slopes(points: torch.Tensor) -> torch.Tensor:
    x = points[:, 0]
    rows = [
        torch.stack([-20 * x, torch.full_like(x, 10)], 1),
        torch.stack([-torch.ones_like(x), torch.zeros_like(x)], 1),
    ]
    return torch.stack(rows, 1)


def test_the_end_of_a_curved_valley_is_found_from_every_start():
    starts = 3 * gaussian(40, 2)
    found = levenberg_marquardt(Points.begin(starts, valley), valley, valley_slopes, steps=100)
    torch.testing.assert_close(found.parameters, torch.ones(40, 2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (found.objective < 1e-12).all()


def test_no_start_ever_rises():
    seen = [Points.begin(3 * gaussian(40, 2), valley)]
    levenberg_marquardt(seen[0], valley, valley_slopes, steps=30, on_step=lambda _, points: seen.append(points))
    for before, after in itertools.pairwise(seen):
        assert (after.objective <= before.objective).all()
        torch.testing.assert_close(after.objective, valley(after.parameters).square().sum(1))
    assert (seen[5].objective < seen[0].objective).any()


def test_linear_least_squares_is_solved_whatever_the_scales():
    matrix, wish = gaussian(9, 4) * torch.tensor([1e3, 1.0, 1e-1, 10.0], dtype=torch.float64), gaussian(9, seed=1)
    found = levenberg_marquardt(
        Points.begin(torch.zeros(1, 4, dtype=torch.float64), lambda p: p @ matrix.mT - wish),
        lambda p: p @ matrix.mT - wish,
        lambda p: matrix.expand(len(p), 9, 4),
        steps=200,
    )
    solution = torch.linalg.lstsq(matrix, wish[:, None]).solution[:, 0]
    assert float(found.objective) == pytest.approx(float((matrix @ solution - wish).square().sum()), rel=1e-6)


def test_batches_do_not_change_what_a_start_finds(monkeypatch):
    begin = Points.begin(3 * gaussian(11, 2), valley)
    whole = levenberg_marquardt(begin, valley, valley_slopes, steps=7)
    monkeypatch.setattr(rooms, "BATCH_NUMBERS", 3 * 4)  # three starts of two residuals and two parameters
    parts = levenberg_marquardt(begin, valley, valley_slopes, steps=7)
    torch.testing.assert_close(parts.parameters, whole.parameters)
    torch.testing.assert_close(parts.damping, whole.damping)


def test_steps_taken_in_two_goes_are_the_same_steps():
    begin = Points.begin(3 * gaussian(5, 2), valley)
    once = levenberg_marquardt(begin, valley, valley_slopes, steps=8)
    half = levenberg_marquardt(begin, valley, valley_slopes, steps=4)
    torch.testing.assert_close(levenberg_marquardt(half, valley, valley_slopes, steps=4).parameters, once.parameters)


def test_where_nothing_can_be_gained_nothing_moves():
    begin = Points.begin(torch.ones(3, 2, dtype=torch.float64), valley)
    found = levenberg_marquardt(begin, valley, valley_slopes, steps=20)
    torch.testing.assert_close(found.parameters, begin.parameters)
    flat = Points.begin(gaussian(3, 2), lambda p: torch.ones(len(p), 4, dtype=torch.float64))
    still = levenberg_marquardt(
        flat,
        lambda p: torch.ones(len(p), 4, dtype=torch.float64),
        lambda p: torch.zeros(len(p), 4, 2, dtype=torch.float64),
        steps=20,
    )
    torch.testing.assert_close(still.parameters, flat.parameters)
