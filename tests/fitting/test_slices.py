"""Grids of independent low-rank slices, with ranks that differ."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from isogrid import Metric
from isogrid.fitting import fit_slices, project_slices
from isogrid.fitting import slices as slices_module
from tests.formats.cases import gaussian, ill_conditioned

MIXED = torch.tensor([[0, 1, 2], [3, 2, 0]])


def in_order(blocks: Tensor) -> Tensor:
    """The rows of every group over the whole input: (A, C, s, p) -> (A, s, C p)."""
    return blocks.transpose(1, 2).flatten(2)


def objective(blocks: Tensor, left: Tensor, right: Tensor, metric: Metric) -> float:
    return sum(metric.squared_norm(group) for group in in_order(blocks - left @ right))


def best(block: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank."""
    u, sigma, vh = torch.linalg.svd(block, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (3, 3), (1, 3), (3, 1)], ids=str)
def test_projection_with_mixed_ranks(shape: tuple[int, int]) -> None:
    blocks = gaussian(2, 3, *shape)
    left, right = project_slices(blocks, MIXED)
    assert left.shape == (2, 3, shape[0], 3)
    assert right.shape == (2, 3, 3, shape[1])
    for a in range(2):
        for c in range(3):
            rank = int(MIXED[a, c])
            assert torch.allclose(left[a, c] @ right[a, c], best(blocks[a, c], rank), atol=1e-12)
            assert torch.equal(left[a, c, :, rank:], torch.zeros(shape[0], 3 - rank, dtype=torch.float64))
            assert torch.equal(right[a, c, rank:], torch.zeros(3 - rank, shape[1], dtype=torch.float64))
            used = min(rank, *shape)
            assert torch.allclose(left[a, c].norm(dim=0)[:used], right[a, c].norm(dim=1)[:used])


@pytest.mark.parametrize("ranks", [MIXED, torch.full((2, 3), 2), torch.zeros(2, 3, dtype=torch.long)], ids=str)
def test_fit_keeps_the_ranks(ranks: Tensor) -> None:
    blocks, metric = gaussian(2, 3, 4, 5), ill_conditioned(15)
    for sweeps in (0, 1, 5):
        left, right = fit_slices(blocks, ranks, metric, sweeps=sweeps)
        product = left @ right
        for a in range(2):
            for c in range(3):
                rank = int(ranks[a, c])
                assert torch.linalg.matrix_rank(product[a, c], atol=1e-9) <= rank
                assert not left[a, c, :, rank:].any()
                assert not right[a, c, rank:].any()
                assert torch.allclose(left[a, c].norm(dim=0), right[a, c].norm(dim=1), atol=1e-10)


def test_identity_metric_is_the_projection() -> None:
    blocks = gaussian(2, 3, 4, 5)
    left, right = project_slices(blocks, MIXED)
    fitted_left, fitted_right = fit_slices(blocks, MIXED, Metric(torch.eye(15)))
    assert torch.allclose(left @ right, fitted_left @ fitted_right, atol=1e-10)


@pytest.mark.parametrize("ranks", [MIXED, torch.full((2, 3), 2)], ids=str)
def test_objective_reported_and_never_rising(ranks: Tensor) -> None:
    blocks, metric = gaussian(2, 3, 4, 5), ill_conditioned(15)
    log: list[tuple[int, float]] = []
    left, right = fit_slices(
        blocks, ranks, metric, sweeps=15, tolerance=0.0, on_step=lambda step, value: log.append((step, value))
    )
    values = [value for _, value in log]
    assert [step for step, _ in log] == list(range(len(log)))
    assert all(later <= before * (1 + 1e-12) for before, later in pairwise(values))
    assert values[-1] < 0.9 * values[0]
    assert objective(blocks, left, right, metric) == pytest.approx(values[-1], rel=1e-9)


def test_every_slice_is_optimal_while_the_others_stand_still() -> None:
    # At the end of the descent no slice can be improved alone, nor all left factors together.
    blocks, metric = gaussian(2, 3, 4, 5), ill_conditioned(15, condition=1e2)
    left, right = fit_slices(blocks, MIXED, metric, sweeps=500, tolerance=0.0)
    left.requires_grad_()
    right.requires_grad_()
    error = in_order(blocks - left @ right)
    value = ((error @ metric.matrix) * error).sum()
    for gradient in torch.autograd.grad(value, (left, right)):
        assert gradient.abs().max() < 1e-5 * value.item()


def test_start_is_the_optimum_under_each_column_groups_own_metric() -> None:
    blocks, metric = gaussian(2, 3, 4, 5), ill_conditioned(15, condition=1e3)
    left, right = fit_slices(blocks, MIXED, metric, sweeps=0)
    for c in range(3):
        root = torch.linalg.cholesky(metric.matrix[5 * c : 5 * c + 5, 5 * c : 5 * c + 5])
        for a in range(2):
            whitened = best(blocks[a, c] @ root, int(MIXED[a, c])) @ torch.linalg.inv(root)
            assert torch.allclose(left[a, c] @ right[a, c], whitened, atol=1e-9)


def test_one_column_group_needs_no_sweep() -> None:
    blocks, metric = gaussian(3, 1, 6, 7), ill_conditioned(7)
    ranks = torch.tensor([[1], [3], [2]])
    values: list[float] = []
    fit_slices(blocks, ranks, metric, sweeps=3, tolerance=0.0, on_step=lambda _, value: values.append(value))
    exact = sum(float(torch.linalg.svdvals(blocks[a, 0] @ metric.root)[ranks[a, 0] :].square().sum()) for a in range(3))
    assert values[0] == pytest.approx(exact, rel=1e-8)
    assert min(values) == pytest.approx(exact, rel=1e-8)


def test_slices_that_lack_directions() -> None:
    # Zero and rank-one slices under ranks of two: the joint update's normal equations are singular there.
    blocks = gaussian(2, 3, 4, 5)
    blocks[0, 1] = 0
    blocks[1, 2] = gaussian(4, 1, seed=1) @ gaussian(1, 5, seed=2)
    for metric in (ill_conditioned(15), Metric.from_rows(gaussian(4, 15, seed=3), damping=0.0)):
        values: list[float] = []
        left, right = fit_slices(
            blocks, torch.full((2, 3), 2), metric, sweeps=5, on_step=lambda _, value, log=values: log.append(value)
        )
        assert torch.isfinite(left).all()
        assert torch.isfinite(right).all()
        assert objective(blocks, left, right, metric) <= values[0] * (1 + 1e-6) + 1e-12


def test_row_groups_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, metric = gaussian(5, 3, 4, 5), ill_conditioned(15)
    ranks = torch.arange(15).view(5, 3) % 3
    whole = fit_slices(blocks, ranks, metric)
    monkeypatch.setattr(slices_module, "JOINT_CHUNK", 1)
    parts = fit_slices(blocks, ranks, metric)
    assert torch.allclose(whole[0] @ whole[1], parts[0] @ parts[1], atol=1e-10)


def test_large_slices_take_the_gram_route() -> None:
    blocks, metric = gaussian(2, 2, 20, 24), ill_conditioned(48, condition=1e3)
    ranks = torch.tensor([[3, 1], [0, 4]])
    left, right = fit_slices(blocks, ranks, metric, sweeps=0)
    for c in range(2):
        root = torch.linalg.cholesky(metric.matrix[24 * c : 24 * c + 24, 24 * c : 24 * c + 24])
        for a in range(2):
            whitened = best(blocks[a, c] @ root, int(ranks[a, c])) @ torch.linalg.inv(root)
            assert torch.allclose(left[a, c] @ right[a, c], whitened, atol=1e-8)
