"""The second moment of a layer's inputs, and its roots."""

from __future__ import annotations

import math

import pytest
import torch

from isogrid import IsogridError, Metric
from isogrid.fitting import cholesky, squared_norm
from isogrid.fitting.metric import DEAD_INPUT_FLOOR
from tests.formats.cases import gaussian, generator, ill_conditioned


def test_moment_of_rows() -> None:
    rows = gaussian(5, 4, 6)
    metric = Metric.from_rows(rows)
    flat = rows.reshape(20, 6)
    assert metric.in_features == 6
    assert metric.rows == 20
    assert torch.allclose(metric.moment, flat.T @ flat / 20, rtol=1e-14)
    assert metric.mean is not None
    assert torch.allclose(metric.mean, flat.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_rows_of_any_dtype_are_summed_in_float64(dtype: torch.dtype) -> None:
    rows = (10 * gaussian(300, 4)).to(dtype)
    metric = Metric.from_rows(rows)
    assert metric.moment.dtype == torch.float64
    wide = rows.to(torch.float64)
    assert torch.allclose(metric.moment, wide.T @ wide / 300, rtol=1e-14)


@pytest.mark.parametrize(
    ("rows", "expected"), [(None, 0.0), (4, 0.1), (16, 0.1), (40, 0.04), (400, 0.0004), (4000, 4e-6)]
)
def test_damping_rule(rows: int | None, expected: float) -> None:
    # min(0.1, 4 (n / rows)²) with n = 4, and nothing for an exact moment.
    metric = Metric(ill_conditioned(4).moment, rows=rows)
    assert metric.damping == pytest.approx(expected)
    assert Metric(metric.moment, rows=rows, damping=0.3).damping == 0.3


def test_damping_is_relative_to_the_diagonal() -> None:
    moment = ill_conditioned(5, condition=100).moment
    damped = Metric(moment, damping=0.05)
    assert torch.allclose(damped.matrix, moment + 0.05 * torch.diag(moment.diagonal()))
    assert torch.allclose(damped.root @ damped.root.T, damped.matrix)
    assert torch.equal(damped.root, damped.root.tril())
    assert damped.root is damped.root, "computed once"
    assert damped.matrix is damped.matrix


def test_dead_inputs_get_a_floor() -> None:
    rows = gaussian(50, 6)
    rows[:, [1, 4]] = 0
    metric = Metric.from_rows(rows, damping=0.0)
    floor = DEAD_INPUT_FLOOR * metric.moment.diagonal().mean()
    assert torch.allclose(metric.matrix.diagonal()[[1, 4]], floor.expand(2))
    alive = torch.tensor([0, 2, 3, 5])
    assert torch.equal(metric.matrix[alive][:, alive], metric.moment[alive][:, alive])
    assert torch.allclose(metric.root @ metric.root.T, metric.matrix, atol=1e-14)
    error = torch.zeros(3, 6, dtype=torch.float64)
    error[:, 1] = 1
    assert metric.squared_norm(error) == pytest.approx(3 * float(floor))


def test_a_zero_moment_is_the_identity() -> None:
    for metric in (Metric(torch.zeros(4, 4)), Metric.from_rows(torch.zeros(7, 4))):
        assert torch.equal(metric.matrix, torch.eye(4, dtype=torch.float64))
        assert torch.equal(metric.root, torch.eye(4, dtype=torch.float64))


def test_fewer_rows_than_inputs() -> None:
    rows = gaussian(3, 8)
    exact = Metric.from_rows(rows, damping=0.0)
    assert torch.isfinite(exact.root).all()
    assert torch.allclose(exact.root @ exact.root.T, exact.matrix, atol=1e-6)
    assert torch.linalg.eigvalsh(Metric.from_rows(rows).matrix).min() > 0


def test_centred() -> None:
    rows = gaussian(200, 5) + torch.tensor([0.0, 3, -2, 0, 10])
    metric = Metric.from_rows(rows)
    assert torch.allclose(metric.centred.moment, torch.cov(rows.T, correction=0))
    assert metric.centred.rows == 200
    assert metric.centred.damping == metric.damping
    assert Metric(metric.moment).centred.moment is not None
    without_mean = Metric(metric.moment)
    assert without_mean.centred is without_mean
    constant = torch.full((40, 3), 3.3, dtype=torch.float64)
    constant[:, 0] = gaussian(40, seed=2)
    metric = Metric.from_rows(constant)
    assert (metric.moment - torch.outer(metric.mean, metric.mean))[1, 1] < 0, "rounding: the case this is about"
    assert (metric.centred.moment.diagonal() >= 0).all()
    assert torch.isfinite(metric.centred.root).all()


def test_padded() -> None:
    metric = ill_conditioned(5)
    padded = metric.padded(8)
    assert metric.padded(5) is metric
    assert padded.in_features == 8
    assert torch.equal(padded.matrix[:5, :5], metric.matrix)
    assert torch.equal(padded.matrix[:5, 5:], torch.zeros(5, 3, dtype=torch.float64))
    assert (torch.linalg.eigvalsh(padded.matrix) > 0).all()
    error = gaussian(3, 5)
    wide = torch.nn.functional.pad(error, (0, 3))
    assert padded.squared_norm(wide) == pytest.approx(metric.squared_norm(error), rel=1e-12)
    damped = Metric(metric.moment, rows=10)
    assert torch.equal(damped.padded(8).matrix[:5, :5], damped.matrix), "damped once, not twice"


def test_permuted() -> None:
    metric = Metric.from_rows(gaussian(30, 6) * torch.arange(1, 7))
    order = torch.randperm(6, generator=generator(1))
    permuted = metric.permuted(order)
    assert torch.equal(permuted.matrix, metric.matrix[order][:, order])
    error = gaussian(3, 6)
    assert permuted.squared_norm(error[:, order]) == pytest.approx(metric.squared_norm(error), rel=1e-12)
    assert torch.equal(permuted.permuted(order.argsort()).matrix, metric.matrix)


def test_squared_norm() -> None:
    metric, error = ill_conditioned(6), gaussian(4, 6)
    assert metric.squared_norm(error) == pytest.approx(float((error @ metric.root).square().sum()), rel=1e-10)
    assert squared_norm(error, metric) == metric.squared_norm(error)
    assert squared_norm(error.float(), None) == pytest.approx(float(error.square().sum()), rel=1e-6)
    assert metric.squared_norm(torch.zeros(4, 6)) == 0


def test_to_the_device_it_is_on_is_itself() -> None:
    metric = ill_conditioned(3)
    assert metric.to("cpu") is metric
    assert metric.to(torch.device("cpu")) is metric


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(3, 4), r"square matrix.*\(3, 4\)"),
        (torch.zeros(3), r"square matrix.*\(3,\)"),
        (torch.zeros(2, 3, 3), "square matrix"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1]]), "NaN or infinite"),
        (torch.tensor([[math.inf, 0], [0, 1]]), "NaN or infinite"),
        (torch.tensor([[1.0, 0.5], [0, 1]]), "symmetric"),
        (torch.tensor([[1.0, 0], [0, -1e-3]]), "negative diagonal"),
    ],
)
def test_what_is_no_second_moment_is_refused(moment: torch.Tensor, message: str) -> None:
    with pytest.raises(IsogridError, match=message):
        Metric(moment)


def test_no_rows_are_refused() -> None:
    with pytest.raises(IsogridError, match="at least one"):
        Metric.from_rows(torch.zeros(0, 4))
    with pytest.raises(IsogridError, match="NaN"):
        Metric.from_rows(torch.tensor([[1.0, math.nan]]))


def test_rounding_asymmetry_is_forgiven_and_removed() -> None:
    moment = ill_conditioned(4).moment
    noisy = moment + 1e-6 * gaussian(4, 4, seed=3)
    metric = Metric(noisy)
    assert torch.equal(metric.moment, metric.moment.T)
    assert torch.allclose(metric.moment, (noisy + noisy.T) / 2)


# ---- the root ------------------------------------------------------------------------------------------------------


def test_root_of_a_batch() -> None:
    matrices = torch.stack([ill_conditioned(5, seed=seed).moment for seed in range(6)]).view(2, 3, 5, 5)
    root = cholesky(matrices)
    assert torch.allclose(root @ root.mT, matrices, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_root_of_a_singular_matrix(rank: int) -> None:
    factor = gaussian(6, rank)
    matrix = factor @ factor.T
    root = cholesky(matrix)
    assert torch.isfinite(root).all()
    assert torch.equal(root, root.tril())
    assert (root.diagonal() > 0).all(), "a fit divides by it"
    assert torch.allclose(root @ root.T, matrix, atol=1e-6 * float(matrix.norm() + 1e-6))


def test_root_of_a_matrix_that_is_not_semidefinite() -> None:
    axes = torch.linalg.qr(gaussian(5, 5)).Q
    values = torch.tensor([1.0, 0.5, 0.1, -1e-3, -1e-2], dtype=torch.float64)
    root = cholesky((axes * values) @ axes.T)
    clipped = (axes * values.clamp(min=1e-10)) @ axes.T
    assert torch.allclose(root @ root.T, clipped, atol=1e-12)
    assert torch.equal(root, root.tril())
    assert (root.diagonal() > 0).all()


def test_root_of_a_batch_with_one_singular_member() -> None:
    good = ill_conditioned(4, condition=10).moment
    root = cholesky(torch.stack([good, torch.ones(4, 4, dtype=torch.float64)]))
    assert torch.allclose(root[0] @ root[0].T, good, atol=1e-7)
    assert torch.allclose(root[1] @ root[1].T, torch.ones(4, 4, dtype=torch.float64), atol=1e-6)
