"""DSFormer: sparse coding against what is known of it, and the format's fits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from isogrid import DenseSparse, IsogridError, LowRank, Metric
from isogrid.fitting import Pattern
from isogrid.fitting.dictionaries import (
    fit_codes_and_atoms,
    matching_pursuit,
    procrustes,
    pursue,
    singular_start,
    spread_start,
)
from isogrid.kernels import unpack_mask
from tests.formats.cases import LargestTensor, gaussian, generator, ill_conditioned
from tests.formats.pruning_problems import F64, relative_loss


def units(*shape: int, seed: int = 0) -> Tensor:
    rows = gaussian(*shape, seed=seed)
    return rows / rows.norm(dim=1, keepdim=True)


def error_of(fmt: DenseSparse, target: Tensor, metric: Metric | None = None, **options: object) -> float:
    found = fmt.dense(fmt.fit(target, metric, **options), *target.shape)  # type: ignore[arg-type]
    moment = torch.eye(target.shape[1], dtype=F64) if metric is None else metric.matrix
    return relative_loss(target, found, moment)


def test_pursuit_of_three_atoms() -> None:
    atoms = torch.tensor([[1, 0, 0], [0, 1, 0], [3**-0.5] * 3], dtype=F64)
    row = torch.tensor([[2, 2, 1]], dtype=F64)
    known = {1: ([0, 0, 2.886751], 2 / 3), 2: ([0.5, 0, 2.598076], 0.5), 3: ([1, 1, 1.732051], 0.0)}
    for keep, (codes, error) in known.items():
        found, mask = pursue(row, atoms, keep)
        assert found[0].tolist() == pytest.approx(codes, abs=1e-6)
        assert int(mask.sum()) == keep
        assert float((row - found @ atoms).square().sum()) == pytest.approx(error, abs=1e-9)


def test_pursuit_is_least_squares_on_the_atoms_taken() -> None:
    atoms, rows = units(10, 6), gaussian(40, 6, seed=1)
    before = rows.square().sum(1)
    for keep in (1, 2, 3, 6):
        codes, mask = pursue(rows, atoms, keep)
        left = rows - codes @ atoms
        assert ((left @ atoms.mT) * mask).abs().max() < 1e-7, "what is left meets none of them"
        error = left.square().sum(1)
        assert (error <= before * (1 + 1e-12) + 1e-12).all()
        before = error
        assert (mask.sum(1) == keep).all()
    best = (rows.square().sum(1, keepdim=True) - (rows @ atoms.mT).square()).amin(1)
    one = (rows - pursue(rows, atoms, 1)[0] @ atoms).square().sum(1)
    assert torch.allclose(one, best, rtol=1e-8), "a single atom is the best one"


def test_orthonormal_atoms_need_no_pursuit() -> None:
    atoms = torch.linalg.qr(gaussian(9, 9)).Q[:6]
    rows = gaussian(20, 9, seed=1)
    codes, mask = pursue(rows, atoms, 2)
    met = rows @ atoms.mT
    least = torch.full((20,), torch.inf, dtype=F64)
    for pair in itertools.combinations(range(6), 2):
        least = torch.minimum(least, rows.square().sum(1) - met[:, list(pair)].square().sum(1))
    assert torch.allclose((rows - codes @ atoms).square().sum(1), least, rtol=1e-7)
    assert torch.allclose(codes[mask], met[mask], rtol=1e-7)


def test_twice_the_same_atom_is_finite() -> None:
    atoms = units(3, 5)[[0, 1, 1]]
    codes, _ = pursue(gaussian(7, 5), atoms, 3)
    assert torch.isfinite(codes).all()


def test_pursuit_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, atoms = gaussian(23, 6), units(8, 6)
    whole = pursue(rows, atoms, 3)
    monkeypatch.setattr("isogrid.fitting.dictionaries.CODING_NUMBERS", 60)
    pieces = pursue(rows, atoms, 3)
    assert torch.allclose(whole[0], pieces[0], atol=1e-12)
    assert torch.equal(whole[1], pieces[1])


def test_more_alternations_never_lose() -> None:
    rows = gaussian(60, 16)
    for fit in (
        lambda rounds: matching_pursuit(rows, spread_start(rows, 12, generator()), 3, rounds),
        lambda rounds: procrustes(rows, 12, 3, rounds),
    ):
        errors = []
        for rounds in (0, 1, 2, 4, 8):
            codes, mask, atoms = fit(rounds)
            errors.append(float((rows - codes @ atoms).square().sum()))
            assert (mask.sum(1) == 3).all()
        assert all(later <= before * (1 + 1e-9) for before, later in itertools.pairwise(errors))
        assert errors[-1] < errors[0]


def test_descent_lowers_the_error_of_coupled_blocks() -> None:
    target, moment = gaussian(20, 24), ill_conditioned(24, condition=1e3).matrix
    codes, mask = zip(*(procrustes(part, 6, 3, 3)[:2] for part in target.split(12, dim=1)), strict=True)
    atoms = torch.stack([procrustes(part, 6, 3, 3)[2] for part in target.split(12, dim=1)])
    errors: list[float] = []
    found, places, atoms = fit_codes_and_atoms(
        target, moment, (torch.cat(codes, 1), torch.cat(mask, 1), atoms), Pattern(3, 6),
        rounds=10, tolerance=0.0, generator=generator(), on_step=lambda _, error: errors.append(error),
    )  # fmt: skip
    assert all(later <= before * (1 + 1e-12) for before, later in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    assert (places.view(20, 2, 6).sum(-1) == 3).all()
    assert (found[~places] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_blocks_without_inputs(seed: int) -> None:
    """Four blocks of two columns for five: one has a column, one none; what is there is fitted exactly."""
    target = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    fmt = DenseSparse(4, blocks=4)
    for solver in ("default", "projection"):
        factors = fmt.fit(target, solver=solver)
        assert (factors["dictionary"].transpose(0, 1).reshape(4, 8)[:, 5:] == 0).all()
        assert relative_loss(target.double(), fmt.dense(factors, 16, 5).double(), torch.eye(5).double()) < 1e-10


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize(("out", "features", "atoms", "blocks"), [(16, 8, 4, 2), (12, 6, 4, 1), (24, 12, 6, 2)])
def test_a_round_that_rounding_spoils_is_taken_back(
    seed: int, out: int, features: int, atoms: int, blocks: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    target, rows = (torch.randn(count, features, generator=source) for count in (out, 3))
    rows[:, 0] *= 1e4
    fmt, metric = DenseSparse(atoms, blocks=blocks), Metric.from_rows(rows)
    errors: list[float] = []
    found = fmt.fit(target, metric, on_step=lambda _, error: errors.append(error))
    assert all(later <= before for before, later in itertools.pairwise(errors))
    reached = fmt.dense(found, out, features).double() - target.double()
    size = float(((target.double() @ metric.matrix) * target.double()).sum())
    assert float(((reached @ metric.matrix) * reached).sum()) <= errors[0] + 1e-10 * size


def test_all_atoms_of_one_block_are_low_rank() -> None:
    target = gaussian(14, 10)
    for metric in (None, ill_conditioned(10, condition=1e2)):
        fmt = DenseSparse(4, ratio=1)
        one = LowRank(4).dense(LowRank(4).fit(target, metric), 14, 10)
        moment = torch.eye(10, dtype=F64) if metric is None else metric.matrix
        assert error_of(fmt, target, metric) == pytest.approx(relative_loss(target, one, moment), rel=1e-8)


def test_the_largest_member_holds_every_matrix() -> None:
    target = gaussian(8, 12)
    fmt = DenseSparse(ratio=2).with_size(DenseSparse().size_limit(8, 12))
    assert error_of(fmt, target, ill_conditioned(12, condition=1e2)) < 1e-12


def test_error_does_not_see_how_inputs_are_turned_or_the_target_scaled() -> None:
    target = gaussian(30, 12)
    turn = torch.linalg.qr(gaussian(12, 12, seed=5)).Q
    fmt = DenseSparse(6)
    plain = error_of(fmt, target, solver="procrustes")
    assert error_of(fmt, target @ turn, solver="procrustes") == pytest.approx(plain, rel=1e-6)
    assert error_of(fmt, 100 * target, solver="procrustes") == pytest.approx(plain, rel=1e-6)


def test_known_errors_of_structureless_and_structured_matrices() -> None:
    source = generator()
    noise = torch.randn(256, 128, generator=source, dtype=F64)
    spaces = torch.cat(
        [
            torch.randn(32, 8, generator=source, dtype=F64) @ torch.randn(8, 128, generator=source, dtype=F64)
            for _ in range(8)
        ]
    )
    spaces += 0.05 * spaces.std() * torch.randn(256, 128, generator=source, dtype=F64)
    # (atoms, ratio): error, and the error of truncated SVD with as many bits.
    for atoms, ratio, dense_sparse, svd in ((64, 8, 0.390, 0.542), (64, 2, 0.223, 0.357)):
        fmt = DenseSparse(atoms, ratio)
        assert error_of(fmt, noise) <= 1.02 * dense_sparse
        assert error_of(fmt, noise, solver="procrustes") >= error_of(fmt, noise)
        rank = fmt.cost(256, 128, torch.bfloat16).bits // (16 * (256 + 128))
        low = LowRank(rank).dense(LowRank(rank).fit(noise), 256, 128)
        assert relative_loss(noise, low, torch.eye(128).double()) == pytest.approx(svd, rel=0.05)
    assert error_of(DenseSparse(64, 8), spaces) < 0.02, "low rank leaves 0.2 of it"


def test_a_metric_is_worth_knowing() -> None:
    target, metric = gaussian(40, 24), ill_conditioned(24, condition=1e4)
    for blocks in (1, 2, 5):
        fmt = DenseSparse(8, blocks=blocks) if blocks < 5 else DenseSparse(4, blocks=blocks)
        weighted = error_of(fmt, target, metric)
        plain = fmt.dense(fmt.fit(target, metric, solver="projection"), 40, 24)
        assert weighted < relative_loss(target, plain, metric.matrix)


def test_codes_keep_as_many_in_every_block() -> None:
    fmt = DenseSparse(5, ratio=2, blocks=3)
    factors = fmt.fit(gaussian(11, 16), ill_conditioned(16))
    assert (unpack_mask(factors["mask"], 15).view(11, 3, 5).sum(-1) == 3).all()
    lengths = factors["dictionary"].norm(dim=-1)
    assert torch.allclose(lengths[lengths > 0], torch.ones(1, dtype=F64))


def test_what_is_refused() -> None:
    with pytest.raises(IsogridError, match="ratio is a positive integer, got 0"):
        DenseSparse(4, ratio=0)
    with pytest.raises(IsogridError, match="dense_sparse has no atoms yet"):
        DenseSparse().factors(4, 4)
    with pytest.raises(IsogridError, match="no more than the 6 inputs of a block, got atoms=8"):
        DenseSparse(8).fit(gaussian(9, 6), solver="procrustes")
    with pytest.raises(IsogridError, match="rounds=-1"):
        DenseSparse(2).fit(gaussian(9, 6), rounds=-1)


@pytest.mark.parametrize("rank", [0, 2, 4])
@pytest.mark.parametrize("rows", [4, 7, 30])
def test_orthonormal_starts(rows: int, rank: int) -> None:
    target = gaussian(rows, rank) @ gaussian(rank, 9, seed=1)
    start = singular_start(target, 7)
    assert torch.allclose(start @ start.mT, torch.eye(7, dtype=F64), atol=1e-12)
    assert torch.allclose(target @ start.mT @ start, target, atol=1e-12)


@pytest.mark.parametrize("shape", [(3000, 8), (3, 2000)])
def test_memory_of_a_start_is_that_of_the_matrix(shape: tuple[int, int]) -> None:
    target = gaussian(*shape)
    with LargestTensor() as largest:
        singular_start(target, 4)
    assert largest.numbers <= 4 * target.numel()


@pytest.mark.parametrize("solver", ["procrustes", "omp"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_every_solver_goes_on_from_a_start(solver: str, blocks: int) -> None:
    fmt, metric = DenseSparse(5, 2, blocks=blocks), ill_conditioned(16, condition=1e2)
    target = gaussian(40, 16)
    for used in (None, metric):
        start = fmt.fit(target, used)
        moved = target + 0.3 * gaussian(40, 16, seed=1)
        before, fresh = fmt.dense(start, 40, 16), error_of(fmt, moved, used, solver=solver)
        moment = torch.eye(16, dtype=F64) if used is None else used.matrix
        reached = error_of(fmt, moved, used, solver=solver, start=start)
        assert reached < relative_loss(moved, before, moment)
        assert reached < 1.2 * fresh
        # The start itself, where nothing is better.
        own = error_of(fmt, target, used, solver=solver, start=start, alternations=0)
        assert own <= relative_loss(target, before, moment) * (1 + 1e-9)
