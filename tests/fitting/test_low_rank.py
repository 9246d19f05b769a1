"""The truncated and whitened SVD, and the choice of dominant inputs."""

from __future__ import annotations

import pytest
import torch

from isogrid import IsogridError
from isogrid.fitting import balance, dominant_inputs, leading_left, low_rank
from isogrid.fitting.low_rank import GRAM_FROM
from tests.formats.cases import gaussian, generator, ill_conditioned

SOLVERS = ("default", "svd", "gram", "randomized")


def decaying(m: int, n: int, ratio: float = 0.5, *, seed: int = 0) -> torch.Tensor:
    """A matrix with singular values 1, ratio, ratio², …"""
    k = min(m, n)
    u, v = torch.linalg.qr(gaussian(m, k, seed=seed)).Q, torch.linalg.qr(gaussian(n, k, seed=seed + 1)).Q
    return (u * ratio ** torch.arange(k, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30), (7, 5), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_leading_left_directions(solver: str, shape: tuple[int, int]) -> None:
    a = decaying(*shape)
    for rank in {1, min(shape) // 2, min(4, min(shape))} - {0}:
        u = leading_left(a, rank, solver=solver, generator=generator())
        assert u.shape == (shape[0], rank)
        assert torch.allclose(u.T @ u, torch.eye(rank, dtype=torch.float64), atol=1e-10)
        exact = torch.linalg.svd(a).U[:, :rank]
        assert torch.allclose(u @ u.T, exact @ exact.T, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_leading_left_of_a_batch(solver: str) -> None:
    batch = torch.stack([decaying(20, 24, seed=seed) for seed in range(6)]).view(2, 3, 20, 24)
    u = leading_left(batch, 3, solver=solver, generator=generator())
    for i in range(2):
        for j in range(3):
            alone = leading_left(batch[i, j], 3, solver="svd")
            assert torch.allclose(u[i, j] @ u[i, j].T, alone @ alone.T, atol=1e-6)


def test_default_leaves_the_gram_matrix_where_it_is_blind() -> None:
    # Directions below the root of the resolution drown in the Gram matrix; the default must still find them.
    n = 2 * GRAM_FROM
    axes = [torch.linalg.qr(gaussian(n, n, seed=seed)).Q for seed in (0, 1)]
    values = torch.cat([torch.ones(4), 1e-9 * torch.arange(8, 4, -1), torch.zeros(n - 8)]).double()
    a = (axes[0] * values) @ axes[1].T
    u = leading_left(a, 8)
    assert torch.allclose(u @ u.T, axes[0][:, :8] @ axes[0][:, :8].T, atol=1e-5)


def test_rank_deficient_and_zero_matrices() -> None:
    for solver in SOLVERS:
        for a in (decaying(20, 24)[:, :3] @ gaussian(3, 24), torch.zeros(20, 24, dtype=torch.float64)):
            u = leading_left(a, 6, solver=solver, generator=generator())
            assert torch.isfinite(u).all()
            assert torch.allclose(u @ (u.T @ a), a, atol=1e-10)


def test_unknown_solver() -> None:
    for size in (4, 2 * GRAM_FROM):
        with pytest.raises(
            IsogridError, match="unknown solver 'lanczos'; low rank has: default, svd, gram, randomized"
        ):
            leading_left(gaussian(size, size), 2, solver="lanczos")  # type: ignore[arg-type]


def test_randomized_follows_its_generator() -> None:
    a = gaussian(50, 60)
    one, same, other = (leading_left(a, 5, solver="randomized", generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_factors_are_balanced() -> None:
    target = 1e6 * decaying(12, 10, 0.1)
    for metric in (None, ill_conditioned(10)):
        left, right = low_rank(target, metric, 6)
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-9)


def test_missing_directions_can_still_be_trained() -> None:
    # Zero on the right, one on the left: the product is exact and gradients still flow into the right factor.
    target = gaussian(8, 2) @ gaussian(2, 9)
    left, right = low_rank(target, None, 5)
    assert torch.allclose(left @ right, target, atol=1e-12)
    assert torch.allclose(left[:, 2:].norm(dim=0), torch.ones(3, dtype=torch.float64))
    assert right[2:].norm() < 1e-12
    left, right = low_rank(torch.zeros(8, 9, dtype=torch.float64), None, 3)
    assert torch.equal(right, torch.zeros(3, 9, dtype=torch.float64))
    assert torch.allclose(left.norm(dim=0), torch.ones(3, dtype=torch.float64))


def test_balance_keeps_the_product() -> None:
    left, right = torch.linalg.qr(gaussian(4, 6, 3)).Q, gaussian(4, 3, 5, seed=1)
    a, b = balance(left, right)
    assert torch.allclose(a @ b, left @ right)
    assert torch.allclose(a.norm(dim=-2), b.norm(dim=-1))


# ---- dominant inputs -----------------------------------------------------------------------------------------------


def orthonormal_rows(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(gaussian(n, k, seed=seed)).Q.T


@pytest.mark.parametrize("bound", [1.0 + 1e-6, 1.05, 2.0])
@pytest.mark.parametrize(("k", "n"), [(1, 7), (3, 10), (10, 11), (20, 64), (7, 7), (1, 1)])
def test_dominant_inputs(k: int, n: int, bound: float) -> None:
    for seed in range(3):
        basis = orthonormal_rows(k, n, seed)
        order, coefficients = dominant_inputs(basis, bound)
        assert coefficients.shape == (k, n - k)
        assert sorted(order.tolist()) == list(range(n))
        assert order[:k].tolist() == sorted(order[:k].tolist())
        assert order[k:].tolist() == sorted(order[k:].tolist())
        assert torch.allclose(basis[:, order[:k]] @ coefficients, basis[:, order[k:]], atol=1e-12)
        if n > k:
            assert coefficients.abs().max() <= bound + 1e-9


def test_one_dominant_input_is_the_largest() -> None:
    basis = torch.nn.functional.normalize(torch.tensor([[0.3, -4.0, 1.0, 3.9]], dtype=torch.float64))
    order, coefficients = dominant_inputs(basis)
    assert order.tolist() == [1, 0, 2, 3]
    assert torch.allclose(coefficients, basis[:, [0, 2, 3]] / basis[0, 1])


def test_all_inputs_are_dominant_at_full_rank() -> None:
    order, coefficients = dominant_inputs(orthonormal_rows(6, 6))
    assert order.tolist() == list(range(6))
    assert coefficients.shape == (6, 0)


def test_inputs_that_repeat_and_inputs_that_are_dead() -> None:
    # Pairs of equal columns, and zeros: the first k inputs would be singular.
    half = orthonormal_rows(4, 9)
    basis = torch.cat([torch.zeros(4, 3, dtype=torch.float64), half.repeat_interleave(2, dim=1) / 2**0.5], dim=1)
    order, coefficients = dominant_inputs(basis)
    assert coefficients.abs().max() <= 1.05
    assert torch.allclose(basis[:, order[:4]] @ coefficients, basis[:, order[4:]], atol=1e-12)
    assert torch.equal(coefficients[:, :3], torch.zeros(4, 3, dtype=torch.float64))


def test_a_basis_that_partial_pivoting_serves_badly() -> None:
    # Wilkinson's growth matrix: LU pivots leave coefficients of 2^(k-1); the exchanges must take them down.
    k = 12
    triangle = torch.eye(k, dtype=torch.float64) - torch.tril(torch.ones(k, k, dtype=torch.float64), -1)
    columns = torch.cat([triangle, torch.ones(k, 1, dtype=torch.float64)], dim=1)
    basis = torch.linalg.qr(columns.T).Q.T
    order, coefficients = dominant_inputs(basis)
    assert coefficients.abs().max() <= 1.05
    assert torch.allclose(basis[:, order[:k]] @ coefficients, basis[:, order[k:]], atol=1e-10)
