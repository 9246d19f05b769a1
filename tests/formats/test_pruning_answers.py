"""What pruners and quantizers give on problems whose answers are known, and what no answer may do."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid import Format, IsogridError, IsogridWarning, Metric, Quantized, SemiStructured, Sparse
from isogrid.fitting import (
    Groups,
    Kept,
    Pattern,
    damped_moment,
    inverse_root,
    prune,
    pruned,
    refitted,
    sweep_columns,
    sweep_supports,
)
from isogrid.fitting.sweep import KeepGroups, KeepMask
from isogrid.kernels import pack_codes, pack_mask, packed_bytes, unpack_codes, unpack_mask
from tests.formats.cases import gaussian, generator, ill_conditioned
from tests.formats.pruning_problems import F64, correlated_case, hand_case, loss, relative_loss

bounded = settings(max_examples=25, deadline=None, derandomize=True)


def fitted(fmt: Format, weight: Tensor, metric: Metric | None = None, **options: object) -> Tensor:
    factors = fmt.fit(weight, metric, **options)  # type: ignore[arg-type]
    return fmt.dense(factors, *weight.shape)


def pattern_of(found: Tensor) -> list[str]:
    return ["".join("01"[int(entry != 0)] for entry in row) for row in found]


# ---- bits ------------------------------------------------------------------------------------------------------------


@bounded
@given(rows=st.integers(0, 4), n=st.integers(1, 40), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_packing_loses_nothing(rows: int, n: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, n), generator=generator(seed))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_bytes(n, bits))
    assert torch.equal(unpack_codes(packed, bits, n).long(), codes)
    assert torch.equal(unpack_mask(pack_mask(codes > 0), n), codes > 0)


def test_the_lowest_bit_is_the_first_entry() -> None:
    assert pack_mask(torch.tensor([[True, False, False, False, False, False, False, True, True]])).tolist() == [
        [129, 1]
    ]
    assert pack_codes(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]


# ---- the hand case ---------------------------------------------------------------------------------------------------


def test_the_root_of_the_hand_case() -> None:
    weight, metric = hand_case()
    root = inverse_root(damped_moment(metric, 8, 0.0, weight)[0])
    wanted = [1.154701, 0.577350, 2.309401, 1.154701, 0.384900, 1.154701, 2.309401, 0.5]
    assert root.diagonal().tolist() == pytest.approx(wanted, abs=1e-6)
    assert root[0, :3].tolist() == pytest.approx([1.154701, -0.288675, 0], abs=1e-6)
    assert torch.allclose(root.mT @ root @ metric.moment, torch.eye(8, dtype=F64), atol=1e-12)
    assert float(root.tril(-1).abs().max()) == 0


@pytest.mark.parametrize(
    ("fmt", "solver", "patterns", "reached", "refit"),
    [
        (SemiStructured(), "magnitude", ["01011010", "01101001"], 3.5498046875, 2.595535714),
        (SemiStructured(), "wanda", ["01011010", "01101001"], 3.5498046875, 2.595535714),
        (SemiStructured(), "sparsegpt", ["01011010", "01101001"], 3.02734375, 2.595535714),
        (Sparse(7 / 16), "sparsegpt", ["01011000", "01101001"], 4.23046875, 3.629129464),
        (Sparse(8 / 16), "wanda", ["01011010", "01101001"], 3.5498046875, 2.595535714),
        (Sparse(7 / 16), "magnitude", ["01010010", "01101001"], 9.9248046875, 7.802678571),
    ],
)
def test_pruners_on_the_hand_case(fmt: Format, solver: str, patterns: list[str], reached: float, refit: float) -> None:
    weight, metric = hand_case()
    found = fitted(fmt, weight, metric, solver=solver, damping=0.0)
    assert pattern_of(found) == patterns
    assert loss(weight, found, metric.moment) == pytest.approx(reached, rel=1e-9)
    best = refitted(weight, metric.matrix, found != 0, found)
    assert loss(weight, best, metric.moment) == pytest.approx(refit, rel=1e-8)


def test_sparsegpt_weights_of_the_hand_case() -> None:
    weight, metric = hand_case()
    found = fitted(SemiStructured(), weight, metric, solver="sparsegpt", damping=0.0)
    assert found[0].tolist() == pytest.approx([0, -1.75, 0, 3.125, -1, 0, 2.75, 0], abs=1e-9)
    assert found[1].tolist() == pytest.approx([0, 1.5625, -3, 0, 2.1666667, 0, 0, 1.53125], abs=1e-7)
    best = refitted(weight, metric.matrix, found != 0, found)
    assert best[0].tolist() == pytest.approx([0, -1.7, 0, 3.1, -0.9, 0, 2.1, 0], abs=1e-8)
    assert best[1].tolist() == pytest.approx([0, 1.5625, -2.2, 0, 2.0142857, 0, 0, 1.5535714], abs=1e-7)


def test_quantizers_on_the_hand_case() -> None:
    weight, metric = hand_case()
    four = Quantized(bits=4, group=None)
    factors = four.fit(weight, metric, solver="nearest")
    assert factors["scale"].flatten().tolist() == pytest.approx([1 / 3, 1 / 3])
    assert unpack_codes(factors["zero"], 4, 1).flatten().tolist() == [6, 9]
    nearest = four.dense(factors, 2, 8)
    assert loss(weight, nearest, metric.moment) == pytest.approx(0.2297092, abs=1e-7)
    gptq = fitted(four, weight, metric, order=False, damping=0.0)
    changed = (gptq - nearest).abs() > 1e-9
    assert changed.nonzero().tolist() == [[1, 2], [1, 6]], changed
    assert loss(weight, gptq, metric.moment) == pytest.approx(0.1580946, abs=1e-7)
    assert loss(weight, fitted(four, weight, metric, damping=0.0), metric.moment) == pytest.approx(0.1459418, abs=1e-7)
    three = Quantized(bits=3, group=None)
    assert loss(weight, fitted(three, weight), metric.moment) == pytest.approx(1.9391143, abs=1e-7)
    assert loss(weight, fitted(three, weight, metric, order=False, damping=0.0), metric.moment) == pytest.approx(
        1.7143056, abs=1e-7
    )


# ---- the correlated case ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "solver", "error"),
    [
        (Sparse(4095 / 8192), "magnitude", 0.067279),
        (Sparse(0.5), "wanda", 0.036293),
        (Sparse(4095 / 8192), "sparsegpt", 0.011078),
        (Sparse(0.5), "nowag", 0.035885),
        (SemiStructured(2, 4), "magnitude", 0.126550),
        (SemiStructured(2, 4), "wanda", 0.074926),
        (SemiStructured(2, 4), "sparsegpt", 0.018141),
        (SemiStructured(2, 4), "nowag", 0.077640),
        (SemiStructured(4, 8), "magnitude", 0.101413),
        (SemiStructured(4, 8), "wanda", 0.051425),
        (SemiStructured(4, 8), "sparsegpt", 0.014104),
        (SemiStructured(4, 8), "nowag", 0.052267),
    ],
    ids=lambda value: value.label() if isinstance(value, Format) else str(value),
)
def test_pruners_on_the_correlated_case(fmt: Format, solver: str, error: float) -> None:
    weight, inputs = correlated_case()
    moment = inputs.mT @ inputs
    found = fitted(fmt, weight, Metric(moment), solver=solver)
    assert relative_loss(weight, found, moment) == pytest.approx(error, abs=1.5e-6)


@pytest.mark.parametrize(
    ("bits", "group", "options", "error"),
    [
        (4, None, {"solver": "nearest"}, 0.009500),
        (4, None, {"solver": "nearest", "symmetric": True}, 0.011594),
        (4, 32, {"solver": "nearest"}, 0.006625),
        (4, 32, {"solver": "nearest", "symmetric": True}, 0.009460),
        (4, None, {"order": False}, 0.001687),
        (4, None, {}, 0.001284),
        (4, 32, {"order": False}, 0.001126),
        (4, 32, {}, 0.000851),
        (3, None, {"solver": "nearest"}, 0.048616),
        (3, 32, {"solver": "nearest"}, 0.027215),
        (3, None, {"order": False}, 0.007621),
        (3, None, {}, 0.005760),
        (3, 32, {"order": False}, 0.005108),
        (3, 32, {}, 0.003916),
    ],
)
def test_quantizers_on_the_correlated_case(bits: int, group: int | None, options: dict, error: float) -> None:
    weight, inputs = correlated_case()
    moment = inputs.mT @ inputs
    found = fitted(Quantized(bits, group), weight, Metric(moment), **options)
    assert relative_loss(weight, found, moment) == pytest.approx(error, abs=1.5e-6)


def test_fresh_grids_follow_the_compensated_columns() -> None:
    weight, inputs = correlated_case()
    moment = inputs.mT @ inputs
    fresh, static = (
        relative_loss(weight, fitted(Quantized(4, 32), weight, Metric(moment), order=False, fresh=fresh), moment)
        for fresh in (True, False)
    )
    assert fresh == pytest.approx(0.001121, abs=1.5e-6)
    assert fresh != static


def test_exact_sweeps_on_the_correlated_case() -> None:
    weight, inputs = correlated_case()
    metric = Metric(inputs.mT @ inputs)
    for start, errors in (("sparsegpt", {1: 0.011664, 5: 0.008741, 10: 0.008282}), ("wanda", {1: 0.026011})):
        values, mask = pruned(weight, metric, Kept(keep=2, of=4), start, 0.01)
        whole, reached = loss(weight, torch.zeros_like(weight), metric.matrix), {}
        sweep_supports(
            values, mask, weight @ metric.matrix, metric.matrix, Pattern(2, 4),
            whole=whole, sweeps=10, tolerance=0.0, generator=generator(),
            on_step=lambda step, error: reached.__setitem__(step, error / whole),  # noqa: B023
        )  # fmt: skip
        assert {step: reached[step] for step in errors} == pytest.approx(errors, abs=1e-6)
        assert all(reached[step] <= reached[step - 1] for step in range(1, 11))


def test_order_of_the_methods_on_fresh_inputs() -> None:
    weight, inputs = correlated_case()
    noise = gaussian(4096, 128, seed=9)
    fresh = noise.clone()
    for j in range(1, 128):
        fresh[:, j] = 0.9 * fresh[:, j - 1] + 0.19**0.5 * noise[:, j]
    fresh *= inputs.std(0)
    moment, metric = fresh.mT @ fresh, Metric(inputs.mT @ inputs)
    for fmt in (SemiStructured(), Sparse(0.5)):
        errors = [
            relative_loss(weight, fitted(fmt, weight, metric, solver=solver), moment)
            for solver in ("default", "sparsegpt", "wanda", "magnitude")
        ]
        assert errors == sorted(errors)
        assert errors[0] < 0.75 * errors[1]


# ---- properties ------------------------------------------------------------------------------------------------------


def test_the_sum_of_squared_errors_is_the_loss() -> None:
    weight, inputs = correlated_case()
    hessian, _ = damped_moment(Metric(inputs.mT @ inputs), 128, 0.01, weight)
    root = inverse_root(hessian)
    rounding = KeepGroups(weight.shape, root, 2, 4)
    found, errors = sweep_columns(weight, root, rounding)
    assert float(errors.square().sum()) == pytest.approx(loss(weight, found, hessian), rel=1e-10)
    again, _ = sweep_columns(weight, root, KeepMask(rounding.mask), block=7)
    assert torch.allclose(found, again, rtol=1e-10, atol=1e-12), "blocks change nothing"


def test_compensation_is_the_best_for_the_columns_to_come() -> None:
    # Optimal Brain Surgeon by brute force: with the first columns set, the rest is a least-squares problem.
    weight, metric = gaussian(5, 12), ill_conditioned(12, condition=1e3)
    root = inverse_root(metric.matrix)
    for last in (1, 4, 9):
        mask = torch.ones(5, 12, dtype=torch.bool)
        mask[:, :last] = torch.rand(5, last, generator=generator(last)) < 0.5
        found, _ = sweep_columns(weight, root, KeepMask(mask))
        fixed = weight.clone()
        fixed[:, :last] = found[:, :last]
        moment, rest = metric.matrix, slice(last, 12)
        lost = (weight - fixed)[:, :last] @ moment[:last, rest]
        best = weight[:, rest] + torch.linalg.solve(moment[rest, rest], lost.mT).mT
        assert torch.allclose(found[:, rest], best, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 3), (3, 5)])
def test_one_group_equals_brute_force(keep: int, of: int) -> None:
    # All others fixed, the group's best support and values among all, each by its own dense least-squares solve.
    metric, n = ill_conditioned(3 * of, condition=1e3), 3 * of
    weight = gaussian(6, n, seed=3)
    values, mask = pruned(weight, None, Kept(keep=keep, of=of), "magnitude", 0.0)
    groups = Groups(metric.matrix, Pattern(keep, of))
    groups.solved = groups.solved[1:2]
    found, places = values.clone(), mask.clone()
    groups.width = n
    groups.improve(found, places, (weight - values) @ metric.matrix)
    least = torch.full((6,), torch.inf, dtype=F64)
    root = metric.root
    for chosen in itertools.combinations(range(of, 2 * of), keep):
        for row in range(6):
            others = values[row].clone()
            others[of : 2 * of] = 0
            residual = (weight[row] - others) @ root
            solution = torch.linalg.lstsq(root[list(chosen)].mT, residual).solution
            left = float((residual - solution @ root[list(chosen)]).square().sum())
            least[row] = min(least[row], left)
    reached = (((weight - found) @ root).square()).sum(1)
    assert torch.allclose(reached, least, rtol=1e-10)
    assert (places[:, of : 2 * of].sum(1) == keep).all()


def test_sweeps_of_a_tiny_matrix_reach_the_global_optimum_of_most_rows() -> None:
    # Exhaustive over all supports of a row: what block descent can miss, and how rarely it does.
    metric, weight = ill_conditioned(8, seed=4, condition=1e2), gaussian(12, 8, seed=6)
    found = fitted(SemiStructured(2, 4), weight, metric, tolerance=0.0, sweeps=50)
    pairs = list(itertools.combinations(range(4), 2))
    least = torch.full((12,), torch.inf, dtype=F64)
    for one, other in itertools.product(pairs, pairs):
        mask = torch.zeros(12, 8, dtype=torch.bool)
        mask[:, [*one, *(4 + place for place in other)]] = True
        best = refitted(weight, metric.matrix, mask, torch.zeros_like(weight))
        least = torch.minimum(least, (((weight - best) @ metric.matrix) * (weight - best)).sum(1))
    reached = (((weight - found) @ metric.matrix) * (weight - found)).sum(1)
    assert (reached >= least * (1 - 1e-9)).all()
    assert int((reached <= least * (1 + 1e-9)).sum()) >= 8


@bounded
@given(m=st.integers(1, 9), n=st.integers(1, 19), of=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99))
def test_patterns_are_obeyed_exactly(m: int, n: int, of: int, data: st.DataObject, seed: int) -> None:
    fmt = SemiStructured(data.draw(st.integers(1, of)), of)
    weight = gaussian(m, n, seed=seed)
    metric = Metric.from_rows(gaussian(2 * n, n, seed=seed + 1))
    for solver in ("default", "magnitude", "wanda", "sparsegpt", "nowag"):
        found = fitted(fmt, weight.bfloat16(), metric, solver=solver)
        for first in range(0, n, of):
            size = min(of, n - first)
            kept = size - (of - fmt.keep) * size // of
            assert ((found[:, first : first + of] != 0).sum(1) <= kept).all()
        factors = fmt.fit(weight.bfloat16(), metric, solver=solver)
        assert int(unpack_mask(factors["mask"], n).sum()) == fmt.nonzeros(m, n) == factors["values"].numel()


@bounded
@given(m=st.integers(1, 9), n=st.integers(1, 19), density=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_density_is_kept_exactly(m: int, n: int, density: float, seed: int) -> None:
    fmt, weight = Sparse(density), gaussian(m, n, seed=seed)
    metric = Metric.from_rows(gaussian(2 * n, n, seed=seed + 1))
    for solver in ("default", "magnitude", "wanda", "sparsegpt", "nowag"):
        factors = fmt.fit(weight, metric, solver=solver)
        assert int(unpack_mask(factors["mask"], n).sum()) == fmt.nonzeros(m, n) == factors["values"].numel()


def test_wanda_keeps_equal_numbers_in_rows() -> None:
    weight, metric = gaussian(8, 12), Metric.from_rows(gaussian(40, 12, seed=1))
    found = fitted(Sparse(0.5), weight, metric, solver="wanda")
    assert (found != 0).sum(1).tolist() == [6] * 8
    scaled, factor = metric.moment.clone(), torch.ones(12, dtype=F64)
    factor[3] = 10
    scaled = factor.unsqueeze(1) * scaled * factor
    moved = fitted(Sparse(0.5), weight / factor, Metric(scaled), solver="wanda")
    assert torch.equal(moved != 0, found != 0), "the mask does not see how inputs are scaled"


@pytest.mark.parametrize("solver", ["default", "magnitude", "wanda", "sparsegpt", "nowag"])
def test_rows_may_come_in_any_order(solver: str) -> None:
    weight, metric = gaussian(9, 16), ill_conditioned(16, condition=1e3)
    order = torch.randperm(9, generator=generator(2))
    one, other = (fitted(SemiStructured(), rows, metric, solver=solver) for rows in (weight, weight[order]))
    assert torch.allclose(one[order], other, rtol=1e-9, atol=1e-12) or solver == "nowag"


def test_uncorrelated_inputs_leave_the_weights_alone() -> None:
    weight, metric = gaussian(6, 12), Metric(torch.diag(torch.rand(12, generator=generator(), dtype=F64) + 0.1))
    one = fitted(SemiStructured(), weight, metric, solver="sparsegpt", damping=0.0)
    assert torch.allclose(one, fitted(SemiStructured(), weight, metric, solver="wanda"), atol=1e-12)
    assert torch.allclose(one, fitted(SemiStructured(), weight, metric), atol=1e-9)


def test_many_bits_are_the_matrix_and_full_density_is_too() -> None:
    weight, metric = gaussian(6, 12), ill_conditioned(12, condition=1e2)
    assert (fitted(Quantized(8, 4), weight, metric) - weight).abs().max() < 0.05
    for solver in ("default", "magnitude", "wanda", "sparsegpt", "nowag"):
        for fmt in (Sparse(1.0), SemiStructured(4, 4)):
            assert torch.allclose(fitted(fmt, weight, metric, solver=solver), weight, atol=1e-9)


def test_sparse_follows_the_gaussian_law() -> None:
    target = gaussian(400, 400)
    for density, error in ((0.1, 0.7488), (0.3, 0.4655), (0.5, 0.2671), (0.75, 0.0914)):
        reached = float((target - fitted(Sparse(density), target)).norm() / target.norm())
        assert reached == pytest.approx(error, rel=0.01)


def test_ties_go_to_the_earlier_entry() -> None:
    found = fitted(Sparse(10 / 63), torch.ones(7, 9, dtype=F64))
    assert int((found != 0).sum()) == 10
    assert found.flatten()[:10].eq(1).all()


def test_the_last_refit_is_the_least_squares_solution() -> None:
    target, metric = gaussian(6, 11), Metric.from_rows(gaussian(40, 11, seed=3), damping=0.0)
    for fmt in (Sparse(0.4), SemiStructured(1, 3)):
        found = fitted(fmt, target, metric)
        gradient = ((target - found) @ metric.matrix)[found != 0]
        assert gradient.abs().max() < 1e-9


def test_groups_of_many_supports_are_swept_too() -> None:
    weight, inputs = correlated_case()
    metric = Metric(inputs.mT @ inputs)
    swept = fitted(SemiStructured(8, 16), weight, metric)
    assert ((swept != 0).view(64, 8, 16).sum(-1) == 8).all()
    before = fitted(SemiStructured(8, 16), weight, metric, solver="sparsegpt")
    assert relative_loss(weight, swept, metric.matrix) < 0.6 * relative_loss(weight, before, metric.matrix)


def test_a_start_is_improved() -> None:
    weight, inputs = correlated_case()
    metric = Metric(inputs.mT @ inputs)
    for fmt in (SemiStructured(), Sparse(0.5)):
        start = fmt.fit(weight, metric, solver="wanda")
        found = fmt.dense(fmt.fit(weight, metric, start=start, sweeps=1), 64, 128)
        before = fmt.dense(start, 64, 128)
        assert relative_loss(weight, found, metric.matrix) < relative_loss(weight, before, metric.matrix)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0, -0.1, 1.5, True, "half"])
def test_no_density_out_of_range(density: float) -> None:
    with pytest.raises(IsogridError, match=r"sparse: density is a fraction in \(0, 1\]"):
        Sparse(density)


def test_patterns_and_bits_that_are_none() -> None:
    for keep, of in ((0, 4), (2, 0), (1.5, 4), (True, 4)):
        with pytest.raises(IsogridError, match="positive integers"):
            SemiStructured(keep, of)  # type: ignore[arg-type]
    with pytest.raises(IsogridError, match="keep=5 of every of=4"):
        SemiStructured(5, 4)
    for bits, group in ((0, 4), (9, 4), (4, 0), (4, -1), (2.5, 4)):
        with pytest.raises(IsogridError, match=r"quantized: (bits|group) is an integer"):
            Quantized(bits, group)  # type: ignore[arg-type]
    with pytest.raises(IsogridError, match="order=False"):
        Quantized().fit(gaussian(3, 8), Metric(torch.eye(8)), fresh=True)
    with pytest.raises(IsogridError, match="damping"):
        SemiStructured().fit(gaussian(3, 8), Metric(torch.eye(8)), solver="sparsegpt", damping=-1.0)
    with pytest.raises(IsogridError, match="sweeps=-1"):
        SemiStructured().fit(gaussian(3, 8), Metric(torch.eye(8)), sweeps=-1)


@pytest.mark.parametrize("fmt", [SemiStructured(), Sparse(0.5), Quantized(3, 4)], ids=lambda fmt: fmt.label())
def test_dead_inputs_and_few_rows(fmt: Format) -> None:
    rows = gaussian(5, 12, seed=2)  # fewer rows than inputs: the moment has rank five
    rows[:, 3] = 0
    weight, metric = gaussian(7, 12), Metric.from_rows(rows)
    solvers = ("default", "gptq") if isinstance(fmt, Quantized) else ("default", "wanda", "sparsegpt", "nowag")
    for solver in solvers:
        found = fitted(fmt, weight, metric, solver=solver)
        assert torch.isfinite(found).all()
        if solver != "default" or isinstance(fmt, Quantized):
            assert (found[:, 3] == 0).all() or solver == "nowag"
    zeros = Metric(torch.zeros(12, 12))
    assert torch.isfinite(fitted(fmt, weight, zeros)).all()


@pytest.mark.parametrize(
    ("fmt", "solver"), [(SemiStructured(), "sparsegpt"), (Sparse(0.5), "sparsegpt"), (Quantized(3, 4), "gptq")]
)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_inputs_changes_nothing_where_one_is_dead(fmt: Format, solver: str, scale: float) -> None:
    rows = gaussian(40, 12, seed=2) @ gaussian(12, 12, seed=3)
    rows[:, 3] = 0
    weight = gaussian(7, 12)
    one, other = (fitted(fmt, weight, Metric.from_rows(rows * by), solver=solver) for by in (1.0, scale))
    assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_a_hessian_without_full_rank_is_told_of() -> None:
    rows = gaussian(5, 12, seed=2)
    metric = Metric.from_rows(rows, damping=0.0)
    with pytest.warns(IsogridWarning, match=r"no full rank; 0\.01 of its mean diagonal"):
        found = fitted(SemiStructured(), gaussian(7, 12), metric, solver="sparsegpt", damping=0.0)
    assert torch.isfinite(found).all()


def test_nan_activations_are_refused() -> None:
    rows = gaussian(5, 12)
    rows[2, 3] = torch.nan
    with pytest.raises(IsogridError, match="check the calibration inputs"):
        Metric.from_rows(rows)


def test_prune_without_a_metric_is_magnitude() -> None:
    weight = gaussian(5, 12)
    found, mask = prune(
        weight, None, Kept(count=20), start=None, damping=0.0, sweeps=3, tolerance=0.0, generator=generator(),
        on_step=None,
    )  # fmt: skip
    assert torch.equal(found, pruned(weight, None, Kept(count=20), "magnitude", 0.0)[0])
    assert int(mask.sum()) == 20
