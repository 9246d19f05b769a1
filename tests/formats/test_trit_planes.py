"""Trit planes: the known answers, optimality against brute force, the canonical form, what scales and costs are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid import (
    Budget,
    Dense,
    IsogridError,
    LowRank,
    LowRankLight,
    Metric,
    Monarch,
    Stored,
    StructuredLinear,
    TritPlanes,
)
from isogrid.fitting import squared_norm
from isogrid.fitting.trit_matrices import canonical, feed_back, fit_under, improve_trits, refit_scales, written
from isogrid.fitting.trits import (
    LEXICOGRAPHIC,
    SPARSE_FIRST,
    best_scales,
    levels,
    nearest,
    ordered,
    published_scales,
    split,
)
from tests.formats.cases import gaussian, generator, ill_conditioned

HAND = torch.tensor([[0.9, -0.4, 0.1, 0.55, -1.2, 0.05, 0.3, -0.75]], dtype=torch.float64)
some = settings(deadline=None, max_examples=40, derandomize=True)


def relative(groups: Tensor, scales: Tensor) -> float:
    return float((groups - values(nearest(groups, scales), scales)).norm() / groups.norm())


def values(trits: Tensor, scales: Tensor) -> Tensor:
    return (trits * scales.unsqueeze(1)).sum(-1)


def seed_matrix() -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(64, 1024, dtype=torch.float64) * 0.02


# ---- the published loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "wanted"),
    [
        (LEXICOGRAPHIC, [0.662322, 0.252500, 0.124923, 0.121559, 0.119327]),
        (SPARSE_FIRST, [0.662322, 0.231100, 0.122470, 0.119327]),
    ],
    ids=["lexicographic", "sparse first"],
)
def test_published_loop_on_the_hand_group(candidates, wanted):
    errors, firsts = [], []

    def tell(scales: Tensor, trits: Tensor) -> None:
        firsts.append(scales.clone())
        errors.append(float((HAND - values(trits, scales)).square().sum()))

    scales = published_scales(HAND, candidates=candidates, tell=tell)
    assert firsts[0].flatten().tolist() == pytest.approx([0.2656233] * 2, abs=1e-6)
    assert errors[: len(wanted)] == pytest.approx(wanted, abs=1e-6)
    assert errors[-1] == pytest.approx(wanted[-1], abs=1e-6)
    assert ordered(scales).flatten().tolist() == pytest.approx([0.5423077, 0.3942308], abs=1e-6)


def test_published_loop_on_the_seed_problem():
    groups = seed_matrix().view(-1, 128)
    errors = []

    def tell(scales: Tensor, trits: Tensor) -> None:
        errors.append(float((groups - values(trits, scales)).norm() / groups.norm()))

    published_scales(groups, candidates=SPARSE_FIRST, tell=tell)
    assert [errors[step - 1] for step in (1, 2, 3, 5, 10, 20)] == pytest.approx(
        [0.489046, 0.316282, 0.253290, 0.203717, 0.175060, 0.169578], abs=2e-5
    )
    assert relative(groups, published_scales(groups)) == pytest.approx(0.165486, abs=2e-6)
    for group, wanted in {32: 0.160364, 64: 0.165358, 128: 0.169448, 256: 0.171329}.items():
        own = seed_matrix().view(-1, group)
        assert relative(own, published_scales(own, candidates=SPARSE_FIRST)) == pytest.approx(wanted, abs=2e-5)


def test_small_weights_do_not_stop_the_published_loop():
    groups = seed_matrix().view(-1, 128)
    assert relative(1e-6 * groups, published_scales(1e-6 * groups)) == pytest.approx(
        relative(groups, published_scales(groups)), rel=1e-6
    )


# ---- many starts ---------------------------------------------------------------------------------------------------


def test_many_starts_find_the_best_of_the_hand_group():
    scales = split(HAND, 2)
    trits = nearest(HAND, scales)
    assert scales.flatten().tolist() == pytest.approx([0.85, 0.3375])
    assert trits[0, :, 0].tolist() == [1, 0, 0, 1, -1, 0, 0, -1]
    assert trits[0, :, 1].tolist() == [0, -1, 0, -1, -1, 0, 1, 0]
    assert float((HAND - values(trits, scales)).square().sum()) == pytest.approx(0.031875)


def test_many_starts_on_the_seed_problem():
    for group, wanted in {64: 0.150529, 128: 0.159496, 256: 0.164758}.items():
        groups = seed_matrix().view(-1, group)
        scales = split(groups, 2)
        assert relative(groups, scales) == pytest.approx(wanted, rel=2e-4)
    assert float((scales[:, 0] / scales[:, 1]).median()) == pytest.approx(1.52, abs=0.01)
    groups = seed_matrix().view(-1, 128)
    assert relative(groups, split(groups, 1)) == pytest.approx(0.433526, abs=1e-6)
    assert relative(groups[:256], split(groups[:256], 3)) < 0.0535


def test_a_gaussian_of_many_numbers_comes_near_its_theory():
    group = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for planes, error, scales in ((2, 0.17036, (1.38014, 0.90771)), (1, 0.43609, (1.22402,))):
        found = split(group, planes)
        assert relative(group, found) == pytest.approx(error, rel=0.005)
        assert found.flatten().tolist() == pytest.approx(scales, rel=0.02)
        assert relative(group, found) <= relative(group, torch.tensor([scales], dtype=torch.float64))


def test_never_worse_than_the_published_loop_where_asked():
    groups = gaussian(300, 16, seed=3)
    published = ordered(published_scales(groups))
    own = split(groups, 2, published=True)
    errors = [(groups - values(nearest(groups, scales), scales)).square().sum(1) for scales in (own, published)]
    assert (errors[0] <= errors[1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_planted_planes_are_found(planes):
    shares = torch.tensor([1.0, 0.31, 0.1], dtype=torch.float64)[:planes]
    trits = torch.randint(-1, 2, (50, 64, planes), generator=torch.Generator().manual_seed(0))
    groups = values(trits, shares.expand(50, -1))
    found = split(groups, planes)
    exact = (groups - values(nearest(groups, found), found)).norm(dim=1) < 1e-9
    assert exact.double().mean() > 0.9


def test_integers_and_one_plane_within_two():
    steps = torch.arange(-4.0, 5, dtype=torch.float64).view(1, -1)
    assert split(steps, 2).flatten().tolist() == pytest.approx([3, 1])
    one = 0.3 * torch.tensor([[1.0, 0, -1, 1, 0, 0, -1, 1]], dtype=torch.float64)
    scales = split(one, 2)
    assert torch.allclose(values(nearest(one, scales), scales), one, atol=1e-12)
    constant = torch.full((1, 16), 0.7, dtype=torch.float64)
    scales = split(constant, 2)
    assert torch.allclose(values(nearest(constant, scales), scales), constant, rtol=1e-9)


def test_an_outlier_takes_the_sum_and_leaves_the_difference_to_the_others():
    group = torch.randn(1, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.02
    group[0, 5] = 1.0
    scales = split(group, 2)
    assert relative(group, scales) < 0.12
    assert float(scales.sum()) == pytest.approx(1.0, abs=0.02)


@some
@given(seed=st.integers(0, 10_000), planes=st.integers(1, 3), size=st.integers(1, 40))
def test_trits_are_the_best_for_their_scales(seed, planes, size):
    groups = gaussian(3, size, seed=seed)
    scales = ordered(gaussian(3, planes, seed=seed + 1))
    trits = nearest(groups, scales)
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=planes)), dtype=torch.float64)
    brute = (groups.unsqueeze(-1) - (scales @ every.mT).unsqueeze(1)).abs().amin(-1)
    assert torch.allclose((groups - values(trits, scales)).abs(), brute, atol=1e-14)


@some
@given(seed=st.integers(0, 10_000), planes=st.integers(1, 3), weighted=st.booleans())
def test_scales_are_the_best_for_their_trits(seed, planes, weighted):
    groups = gaussian(4, 30, seed=seed)
    trits = torch.randint(-1, 2, (4, 30, planes), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    weights = gaussian(4, 30, seed=seed + 1).square() + 0.1 if weighted else None
    found = best_scales(groups, trits, weights)
    root = torch.ones_like(groups) if weights is None else weights.sqrt()
    wanted = torch.linalg.lstsq(root.unsqueeze(-1) * trits, (root * groups).unsqueeze(-1)).solution[..., 0]
    assert torch.allclose(found, wanted, atol=1e-6)


@some
@given(seed=st.integers(0, 10_000), planes=st.sampled_from([2, 3]), weighted=st.booleans())
def test_a_found_group_stands(seed, planes, weighted):
    # Neither half-step improves on it; and with the best scales errors are at right angles to every plane.
    groups = gaussian(5, 48, seed=seed)
    weights = gaussian(1, 48, seed=seed + 1).square() + 0.1 if weighted else None
    scales = split(groups, planes, weights)
    trits = nearest(groups, scales)
    again = best_scales(groups, trits, None if weights is None else weights.expand_as(groups))
    assert torch.allclose(again, scales, rtol=1e-5, atol=1e-6)


@some
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-12, -1.0, 3.7, 1e9]))
def test_scale_sign_and_order_go_through(seed, scale):
    groups = gaussian(4, 32, seed=seed)
    scales = split(groups, 2)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    for changed, factor in ((scale * groups, abs(scale)), (groups[:, order], 1.0)):
        assert torch.allclose(split(changed, 2), factor * scales, rtol=1e-6)


# ---- the canonical form --------------------------------------------------------------------------------------------


def test_of_equal_codes_the_one_of_fewest_nonzeros():
    cases = {
        (0.5, 0.5): {0.0: (0, 0), 0.5: (1, 0), 1.0: (1, 1)},
        (0.5, 0.0): {0.0: (0, 0), 0.5: (1, 0)},
        (0.8, 0.4): {0.0: (0, 0), 0.4: (0, 1), 0.8: (1, 0), 0.4 + 0.8: (1, 1)},
    }
    for scales, wanted in cases.items():
        sizes, trits = levels(torch.tensor([scales], dtype=torch.float64))
        for size, code in zip(sizes[0].tolist(), trits[0].tolist(), strict=True):
            assert tuple(code) == wanted[size]


@some
@given(seed=st.integers(0, 10_000), planes=st.integers(1, 3))
def test_canonical_is_the_same_matrix(seed, planes):
    scales = gaussian(3, 2, planes, seed=seed)
    trits = torch.randint(-1, 2, (3, 13, planes), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    found, own = canonical(trits, scales, 8)
    assert torch.allclose(written(found, own, 8), written(trits, scales, 8), atol=1e-12)
    assert (own >= 0).all()
    assert (own.diff(dim=-1) <= 0).all()
    again, same = canonical(found, own, 8)
    assert torch.equal(again, found)
    assert torch.equal(same, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", ["default", "ptqtp", "feedback", "diagonal", "multistart"])
def test_fits_are_canonical_for_scales_as_stored(solver, dtype):
    fmt, target = TritPlanes(group=8), gaussian(10, 21).to(dtype)
    metric = Metric(ill_conditioned(21, condition=1e3).matrix)
    factors = fmt.fit(target, metric, solver=solver)
    scales, trits = factors["scales"].double(), fmt.trits(factors, 21)
    assert factors["scales"].dtype == dtype
    assert (scales >= 0).all()
    assert (scales.diff(dim=-1) <= 0).all()
    if solver in ("ptqtp", "diagonal", "multistart"):  # each number its nearest level, of the rounded scales
        padded = torch.nn.functional.pad(target.double(), (0, 3)).view(-1, 8)
        best = nearest(padded, scales.view(-1, 2)).view(10, 24, 2)[:, :21]
        assert torch.equal(best, trits)
    for row in fmt.dense(factors, 10, 21).split(8, 1):
        assert all(len(one.unique()) <= 9 for one in row)


def test_fitting_what_was_fitted_changes_nothing():
    fmt, target = TritPlanes(group=32), gaussian(30, 64)
    once = fmt.dense(fmt.fit(target), 30, 64)
    again = fmt.dense(fmt.fit(once), 30, 64)
    same = (once - again).view(-1, 32).norm(dim=1) < 1e-9
    assert same.double().mean() > 0.95


# ---- under a metric ------------------------------------------------------------------------------------------------


def problem_p() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    w, z, s = (torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((64, 128), (512, 128), (128,)))
    x = z.clone()
    for j in range(1, 128):
        x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * z[:, j]
    return w, x * torch.exp(0.5 * s)


def test_error_feedback_on_problem_p():
    w, x = problem_p()
    h = x.mT @ x
    damped = Metric(h + 0.01 * h.diagonal().mean() * torch.eye(128, dtype=h.dtype), damping=0.0)

    def output_error(matrix: Tensor) -> float:
        return float((x @ (w - matrix).mT).square().sum() / (x @ w.mT).square().sum())

    known = {32: (0.016498, 0.022062, 0.015281, 0.003226), 64: (0.020528, 0.025486, 0.017997, 0.003674),
             128: (0.022920, 0.027481, 0.021451, 0.004215)}  # fmt: skip
    for group, wanted in known.items():
        fmt = TritPlanes(group=group)
        solvers = ("multistart", "ptqtp", "diagonal", "feedback")
        found = [output_error(fmt.dense(fmt.fit(w, damped, solver=one), 64, 128)) for one in solvers]
        # Which of nearly equal local minima a group ends in shows in the outputs; the published loop has no choice.
        assert found == pytest.approx(wanted, rel=0.025)
        assert found[1] == pytest.approx(wanted[1], abs=1e-6)
        swept = output_error(fmt.dense(fmt.fit(w, damped), 64, 128))
        assert swept < 0.95 * found[3]


def test_sweeps_never_raise_the_error():
    target, metric = gaussian(12, 40), ill_conditioned(40, condition=1e4)
    for planes in (1, 2, 3):
        errors = [
            squared_norm(target - written(*fit_under(target, metric, planes, 16, sweeps=sweeps), 16), metric)
            for sweeps in range(4)
        ]
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
        assert errors[1] < errors[0]


def test_refitted_scales_are_the_least_squares_of_a_row():
    target, metric = gaussian(4, 21), ill_conditioned(21, condition=1e3)
    trits, scales = feed_back(target, metric, 2, 8)
    found = refit_scales(target, trits, scales, 8, metric.matrix)
    for i in range(4):
        planes = torch.zeros(21, 3, 2, dtype=torch.float64)
        for j in range(21):
            planes[j, j // 8] = trits[i, j].double()
        wanted = torch.linalg.lstsq(metric.root.mT @ planes.view(21, 6), metric.root.mT @ target[i].unsqueeze(1))
        assert torch.allclose(found[i].flatten(), wanted.solution[:, 0], rtol=1e-5, atol=1e-7)


def test_a_trit_is_the_best_for_all_others():
    target, metric = gaussian(3, 6), ill_conditioned(6, condition=1e2)
    trits, scales = feed_back(target, metric, 1, 6)
    found = improve_trits(target, trits, scales, 6, metric.matrix)
    # The last column was chosen last: no other trit there is better.
    last = [found.clone() for _ in range(3)]
    for trit, one in zip((-1, 0, 1), last, strict=True):
        one[:, 5] = trit
    costs = []
    for one in (found, *last):
        error = target - written(one, scales, 6)
        costs.append(((error @ metric.matrix) * error).sum(1))
    assert all((costs[0] <= other * (1 + 1e-12)).all() for other in costs[1:])


# ---- cost, storage, bad input --------------------------------------------------------------------------------------


def test_stated_bits_are_those_of_the_document():
    for packing, wanted in (("two_bit", 4.25), ("base_three", 3.45)):
        cost = TritPlanes(packing=packing).cost(64, 1280, torch.bfloat16)
        assert cost.bits / (64 * 1280) == wanted
        assert cost.parameters == 2 * 64 * 10
    layer = StructuredLinear(130, 7, TritPlanes(planes=3), bias=False, dtype=torch.bfloat16)
    assert layer.memory()["factors"] == layer.cost().bytes == 7 * (65 + 33 + 2 * 2 * 3)
    assert layer.eval().plan(1) == "structured", "a dense copy would undo what codes are for"
    layer.product = "dense"
    assert layer.plan(1) == "dense"


def test_a_layer_keeps_its_codes_in_any_dtype():
    layer = StructuredLinear(64, 8, TritPlanes(group=16))
    codes = layer.codes.clone()
    layer.to(torch.bfloat16)
    assert layer.codes.dtype == torch.uint8
    assert torch.equal(layer.codes, codes)
    assert layer.scales.dtype == torch.bfloat16
    assert {name for name, _ in layer.named_parameters()} == {"scales", "bias"}


def test_bad_input_is_refused():
    for text, value in (("planes", 0), ("planes", 4), ("group", 0), ("group", 2.5), ("packing", "zip")):
        with pytest.raises(IsogridError, match=f"trit_planes: {text}"):
            TritPlanes(**{text: value})
    with pytest.raises(IsogridError, match="2 NaN or infinite"):
        TritPlanes().fit(torch.tensor([[1.0, float("nan"), float("inf")]]))
    with pytest.raises(IsogridError, match="published loop has two planes"):
        TritPlanes(planes=3).fit(gaussian(3, 4), solver="ptqtp")
    with pytest.raises(IsogridError, match="sweeps is at least 0"):
        TritPlanes().fit(gaussian(3, 4), sweeps=-1)


@pytest.mark.parametrize("solver", ["default", "ptqtp", "feedback", "diagonal"])
def test_zero_rows_dead_inputs_and_groups_that_do_not_divide(solver):
    target = gaussian(6, 21)
    target[2] = 0
    target[:, 8:16] = 0
    moment = ill_conditioned(21, condition=1e3).moment.clone()
    moment[4], moment[:, 4] = 0, 0
    fmt = TritPlanes(group=8)
    factors = fmt.fit(target, Metric(moment), solver=solver)
    matrix = fmt.dense(factors, 6, 21)
    assert torch.isfinite(factors["scales"]).all()
    assert (matrix[2] == 0).all()
    if solver != "feedback" and solver != "default":
        assert (matrix[:, 8:16] == 0).all()
    assert (target - matrix).norm() < 0.5 * target.norm()


@pytest.mark.parametrize("solver", ["default", "multistart", "diagonal", "feedback", "ptqtp"])
@pytest.mark.parametrize(("m", "n"), [(5, 16), (5, 17)])
def test_a_transposed_view_is_fitted_as_its_copy(solver, m, n):
    """A Conv1D's matrix is one."""
    target, fmt = gaussian(n, m).mT, TritPlanes(group=8)
    for metric in (None, ill_conditioned(n, condition=1e2)):
        one, other = (fmt.dense(fmt.fit(t, metric, solver=solver), m, n) for t in (target, target.contiguous()))
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


# ---- other formats, held in codes ----------------------------------------------------------------------------------


def test_a_dense_matrix_held_in_codes_is_the_codes():
    target, metric = gaussian(20, 40), ill_conditioned(40, condition=1e3)
    codes = TritPlanes(group=16)
    for own in (None, metric):
        held = Stored(Dense(), codes).fit(target, own)
        alone = codes.fit(target, own)
        assert torch.equal(held["inner_matrix_codes"], alone["codes"])
        assert torch.equal(held["inner_matrix_scales"], alone["scales"])


def test_low_rank_held_in_codes_knows_what_its_errors_cost():
    source = torch.Generator().manual_seed(0)
    target = gaussian(60, 16, seed=1) @ gaussian(16, 80, seed=2) / 4 + 0.1 * gaussian(60, 80, seed=3)
    metric = Metric.from_rows(gaussian(400, 80, seed=4) * torch.logspace(0, -1.5, 80, dtype=torch.float64))
    inner, codes = LowRank(12), TritPlanes(group=16)
    stored = Stored(inner, codes)
    found = squared_norm(target - stored.dense(stored.fit(target, metric, generator=source), 60, 80), metric)
    plain = inner.fit(target, metric)
    apart = {name: codes.dense(codes.fit(value), *value.shape) for name, value in plain.items()}
    least = squared_norm(target - inner.dense(plain, 60, 80), metric)
    assert found - least < 0.7 * (squared_norm(target - inner.dense(apart, 60, 80), metric) - least)


def test_factors_that_codes_would_not_make_smaller_stay():
    specs = Stored(LowRank(2), TritPlanes()).factors(40, 64)
    assert set(specs) == {"inner_right_scales", "inner_right_codes", "inner_left"}
    fmt = Stored(Monarch(blocks=4), TritPlanes())
    layer = StructuredLinear(256, 256, fmt, dtype=torch.bfloat16, bias=False)
    assert layer.memory()["factors"] == layer.cost().bytes < 256 * 256 * 2 * 0.25


def test_sizes_within_bytes():
    budget = Budget(bytes=6000, dtype=torch.bfloat16)
    fmt = Stored(LowRank()).sized(96, 128, budget)
    assert isinstance(fmt.inner, LowRank)
    assert fmt.inner.rank is not None
    assert budget.allows(fmt.cost(96, 128, torch.bfloat16))
    assert not budget.allows(Stored(LowRank(fmt.inner.rank + 1)).cost(96, 128, torch.bfloat16))
    assert LowRank().sized(96, 128, budget).rank < fmt.inner.rank / 2


def test_stored_refuses_what_is_no_format():
    with pytest.raises(IsogridError, match="stored: codes is a format"):
        Stored(LowRank(), "trit_planes")  # type: ignore[arg-type]


def test_an_order_of_inputs_is_not_rounded_with_scales():
    target = gaussian(400, 600, seed=3)
    inner = LowRankLight(rank=7)
    fmt = Stored(inner, TritPlanes())
    fitted = fmt.fit(target, generator=generator(0), stored=torch.bfloat16)
    assert sorted(fitted["inner_order"].tolist()) == list(range(600))
