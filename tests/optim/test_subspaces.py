"""What holds in every subspace, and the traps of the document."""

import copy
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isogrid import IsogridError
from isogrid.optim import (
    PRESETS,
    EnergyRank,
    ProjectedAdamW,
    ThresholdRank,
    galore,
    subspaces,
    top_r,
)
from isogrid.optim.subspaces import resolve_side
from tests.optim.small import PRESET_OPTIONS, generator, matrix, network, train


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.sampled_from(["auto", "left", "right", "min_state"])
)
def test_within_a_period_the_weight_moves_in_the_subspace_only(rows, columns, rank, side):
    rank = min(rank, rows, columns)
    weight = matrix(rows, columns, dtype=torch.float64)
    start = weight.detach().clone()
    optimizer = ProjectedAdamW([weight], 0.1, rank, side=side, residual="none", refresh=100)
    draw = generator(3)
    for _ in range(6):
        weight.grad = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
        optimizer.step()
    moved = weight.detach() - start
    assert int(torch.linalg.matrix_rank(moved, rtol=1e-9)) <= rank
    state = optimizer.state[weight]
    found = resolve_side(side, rows, columns)
    basis = state[f"basis_{found}"]
    assert torch.allclose(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    inside = basis @ (basis.mT @ moved) if found == "left" else moved @ basis @ basis.mT
    assert torch.allclose(inside, moved, atol=1e-10)


@pytest.mark.parametrize("transition", ["reproject", "reset"])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_signs_of_singular_vectors_change_nothing_once_moments_are_carried_over(monkeypatch, transition, shape):
    from isogrid.optim import subspaces

    def run(flip):
        count = [0]

        def signs(basis):
            count[0] += 1
            turn = torch.ones(basis.shape[1], dtype=basis.dtype)
            turn[:: 1 + count[0] % 2] = -1
            return basis * turn if flip else basis

        monkeypatch.setattr(subspaces, "canonical_signs", signs)
        weight = matrix(*shape, dtype=torch.float64)
        optimizer = ProjectedAdamW([weight], 0.1, 4, projector="svd", residual="none", refresh=4, transition=transition)
        draw = generator(5)
        for _ in range(12):
            weight.grad = torch.randn(shape, generator=draw, dtype=torch.float64)
            optimizer.step()
        return weight.detach()

    assert torch.allclose(run(False), run(True), atol=1e-10)


def test_two_sided_projection_is_exact_at_full_rank_and_thin_below():
    for rank, exact in ((6, True), (2, False)):
        weight, other = matrix(6, 9, dtype=torch.float64), matrix(6, 9, dtype=torch.float64)
        optimizer = ProjectedAdamW([weight], 0.1, rank, side="both", core="sgd", residual="none", projector="svd")
        weight.grad = torch.randn(6, 9, generator=generator(0), dtype=torch.float64)
        optimizer.step()
        u, sigma, vh = torch.linalg.svd(weight.grad, full_matrices=False)
        kept = u[:, :rank] * sigma[:rank] @ vh[:rank]
        assert torch.allclose(weight.detach(), other.detach() - 0.1 * kept, atol=1e-12)
        assert exact == torch.allclose(kept, weight.grad)


@pytest.mark.parametrize("transition", ["keep", "reset", "reproject"])
def test_two_sided_moments_survive_a_refresh(transition):
    weight = matrix(6, 9, dtype=torch.float64)
    optimizer = ProjectedAdamW([weight], 0.1, 2, side="both", residual="none", transition=transition, refresh=2)
    for step in range(5):
        weight.grad = torch.randn(6, 9, generator=generator(step), dtype=torch.float64)
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].shape == (2, 2)
    assert torch.isfinite(weight).all()


def test_a_zero_gradient_keeps_the_basis_or_starts_with_the_first_coordinates():
    for projector in ("svd", "randomized", "power"):
        weight = matrix(5, 8)
        optimizer = ProjectedAdamW([weight], 0.1, 2, projector=projector, side="left", residual="none", refresh=1)
        weight.grad = torch.zeros(5, 8)
        optimizer.step()
        basis = optimizer.state[weight]["basis_left"]
        assert torch.equal(basis.abs(), torch.eye(5, 2))
        weight.grad = torch.randn(5, 8, generator=generator(0))
        optimizer.step()
        found = optimizer.state[weight]["basis_left"].clone()
        weight.grad = torch.zeros(5, 8)
        optimizer.step()
        assert torch.equal(optimizer.state[weight]["basis_left"], found)


@pytest.mark.parametrize("rule", [ThresholdRank(0.5, 6), EnergyRank(0.8, 6)])
@pytest.mark.parametrize("transition", ["keep", "reproject"])
@pytest.mark.parametrize("projector", ["svd", "randomized"])
def test_singular_values_choose_the_rank_and_moments_follow(rule, transition, projector):
    weight = matrix(8, 10, dtype=torch.float64)
    optimizer = ProjectedAdamW(
        [weight],
        0.1,
        rule,
        side="left",
        projector=projector,
        transition=transition,
        refresh=1,
        residual="none",
        oversample=10,
    )
    u = torch.linalg.qr(torch.randn(8, 8, generator=generator(0), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(10, 8, generator=generator(1), dtype=torch.float64)).Q
    for sigma in ([4.0, 3, 2.1, 1.9, 1, 1, 1, 1], [4.0, 1, 1, 1, 0.5, 0.1, 0.1, 0.1], [1.0] * 8):
        values = torch.tensor(sigma, dtype=torch.float64)
        weight.grad = u * values @ v.mT
        optimizer.step()
        if isinstance(rule, ThresholdRank):
            wanted = min(6, sum(s >= 0.5 * sigma[0] for s in sigma))
        else:
            shares = torch.cumsum(values.square(), 0) / values.square().sum()
            wanted = min(6, int((shares < 0.8 - 1e-9).sum()) + 1)
        state = optimizer.state[weight]
        assert state["basis_left"].shape == (8, wanted)
        assert state["exp_avg"].shape == (wanted, 10)


@pytest.mark.parametrize("projector", ["svd", "randomized"])
@pytest.mark.parametrize("rule", [ThresholdRank(0.5, 6), EnergyRank(0.5, 6), 2])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_refresh_on_a_gradient_of_zeros_keeps_basis_and_moments(rule, projector, bits):
    weight = matrix(6, 9)
    optimizer = ProjectedAdamW(
        [weight], 0.01, rule, projector=projector, transition="keep", refresh=2, residual="none", projector_bits=bits
    )
    for step in range(3):
        weight.grad = torch.randn(6, 9, generator=generator(step)) * (step < 2)
        if step == 2:
            held = {key: copy.deepcopy(value) for key, value in optimizer.state[weight].items()}
        optimizer.step()
    state = optimizer.state[weight]
    assert (state["refreshes"], state["moment_step"]) == (2, 3)
    assert torch.equal(state["basis_left"], held["basis_left"])
    assert torch.allclose(state["exp_avg"], 0.9 * held["exp_avg"])


@pytest.mark.parametrize("rank", [2, ThresholdRank(0.5, 6)])
def test_a_decomposition_that_never_converges_keeps_the_basis(monkeypatch, rank):
    weight = matrix(6, 9)
    optimizer = ProjectedAdamW([("w", weight)], 0.01, rank, refresh=2)

    def fails(*_):
        raise torch.linalg.LinAlgError("no convergence")

    for step in range(3):
        weight.grad = torch.randn(6, 9, generator=generator(step))
        if step == 2:
            monkeypatch.setattr(subspaces, "_decomposed", fails)
            held, before = optimizer.state[weight]["basis_left"].clone(), weight.detach().clone()
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["basis_left"], held)
    assert not torch.equal(weight, before)
    late = matrix(6, 9)
    late.grad = torch.ones(6, 9)
    with pytest.raises(IsogridError, match=r"'late' \(6, 9\): no decomposition .* \(no convergence\); begin with"):
        ProjectedAdamW([("late", late)], 0.01, rank).step()


def test_one_sketch_round_is_within_five_percent_of_the_best_error():
    """Document, section 3.1, three spectra."""
    from isogrid.optim.subspaces import randomized_basis

    draw = generator(0)
    u = torch.linalg.qr(torch.randn(256, 256, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(384, 256, generator=draw, dtype=torch.float64)).Q
    index = torch.arange(1, 257, dtype=torch.float64)
    for sigma in (1 / index, index**-0.5, torch.exp(-index / 8)):
        matrix_ = u * sigma @ v.mT
        best = sigma[16:].square().sum().sqrt()
        errors = []
        for rounds in (0, 1, 2):
            found = []
            for seed in range(5):
                basis, _ = randomized_basis(
                    matrix_.matmul, matrix_.mT.matmul, 384, 16, 20, rounds, generator(seed), matrix_
                )
                found.append(float((matrix_ - basis @ (basis.mT @ matrix_)).norm() / best))
            errors.append(sum(found) / len(found))
        assert errors[0] > errors[1] >= errors[2] >= 1 - 1e-9
        assert errors[1] < 1.05


def test_an_adaptive_gap_doubles_while_the_direction_stands():
    """Document, section 5: gap 2, queue 3, nearly constant gradients."""
    weight = matrix(8, 10, dtype=torch.float64)
    optimizer = galore([weight], 0.001, rank=2, refresh=2, adaptive={"queue": 3})
    steady = torch.randn(8, 10, generator=generator(0), dtype=torch.float64)
    draw, gaps = generator(1), []
    for _ in range(40):
        weight.grad = steady + 0.01 * torch.randn(8, 10, generator=draw, dtype=torch.float64)
        refreshes = optimizer.state[weight].get("refreshes", 0) if weight in optimizer.state else 0
        optimizer.step()
        if optimizer.state[weight]["refreshes"] > refreshes:
            gaps.append(optimizer.state[weight]["gap"])
    assert gaps == [2, 2, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [True, False])
def test_buckets_change_nothing(foreach, dtype):
    models = network(dtype=dtype), network(dtype=dtype)
    one = ProjectedAdamW(models[0].parameters(), 0.01, rank=2, refresh=3, foreach=foreach)
    other = ProjectedAdamW(models[1].parameters(), 0.01, rank=2, refresh=3)
    for model, optimizer in zip(models, (one, other), strict=True):
        train(model, optimizer, 5)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PRESETS)
def test_half_precision_weights_keep_float32_states(name):
    weight = matrix(8, 12, dtype=torch.bfloat16)
    optimizer = PRESETS[name]([weight], 0.05, **PRESET_OPTIONS[name])
    target = torch.randn(8, 12, generator=generator(1))
    first = float((weight.detach().float() - target).norm())
    for _ in range(30):
        weight.grad = (weight.detach().float() - target).to(torch.bfloat16)
        optimizer.step()
    assert float((weight.detach().float() - target).norm()) < first
    floats = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in floats)


def test_stochastic_rounding_is_right_on_average():
    from isogrid.optim.codes import round_stochastically

    values = torch.full((20000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    rounded = round_stochastically(values, generator(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float(rounded.mean()) - float(values[0])) < 5e-5
    exact = torch.randn(1000, generator=generator(1)).to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), generator(2)), exact)


PLAIN = {"rank": None, "residual": "none"}


@pytest.mark.parametrize(
    "make",
    [
        partial(ProjectedAdamW, **PLAIN),
        partial(ProjectedAdamW, **PLAIN, core="sgd"),
        partial(ProjectedAdamW, **PLAIN, state="8bit"),
        partial(top_r, fraction=1.0, weight_decay=0.0),
        partial(ProjectedAdamW, rank=64, projector="identity", residual="none"),
    ],
)
def test_stochastic_rounding_keeps_updates_that_bfloat16_would_lose(make):
    means = {}
    for rounding in (False, True):
        runs = []
        for _ in range(2):
            weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
            optimizer = make([weight], lr=1e-3, stochastic_rounding=rounding)
            for _ in range(50):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
            runs.append(weight.detach().clone())
        assert torch.equal(*runs)
        means[rounding] = float(runs[0].float().mean())
    assert means[False] == 1
    assert means[True] == pytest.approx(0.95, abs=2e-3)


def test_embedding_trap():
    """Document, section 9.4: on the left, rows of tokens that came later do not move until the next refresh."""
    start = torch.randn(200, 32, generator=generator(0))
    moved = {}
    for side in ("left", "right"):
        table = nn.Parameter(start.clone())
        optimizer = ProjectedAdamW([table], 0.1, 8, side=side, residual="none", refresh=100)
        draw = generator(1)
        for rows in (torch.arange(50), torch.arange(100, 150)):
            table.grad = torch.zeros(200, 32)
            table.grad[rows] = torch.randn(50, 32, generator=draw)
            before = table.detach().clone()
            optimizer.step()
        moved[side] = (table.detach() - before)[100:150].abs().amax(1)
    assert float(moved["left"].max()) < 1e-3, "only rounding of zeros in the basis"
    assert float(moved["right"].min()) > 1e-3


def test_noise_trap():
    """Document, section 9.1: rows of pure noise take the subspace; what is left over has to move too."""

    def left_over(make):
        draw = generator(0)
        weight = nn.Parameter(torch.randn(12, 16, generator=draw))
        optimizer = make([weight])
        first = float(weight.detach()[:10].square().sum())
        for _ in range(1000):
            gradient = weight.detach().clone()
            gradient[10:] = 20 * torch.randn(2, 16, generator=draw)
            weight.grad = gradient
            optimizer.step()
        return float(weight.detach()[:10].square().sum()) / first

    common = {"side": "left", "style": "torch", "eps": 1e-8, "scale": 1.0}
    assert left_over(lambda p: PRESETS["galore"](p, 0.02, rank=2, refresh=10, **common)) > 0.95
    assert left_over(lambda p: PRESETS["ldadam"](p, 0.02, rank=2, side="left")) < 0.05
    assert left_over(lambda p: ProjectedAdamW(p, 0.02, 2, side="left", refresh=10)) < 0.05


def test_no_warning_is_raised_by_ordinary_steps():
    model = network()
    optimizer = ProjectedAdamW(model.named_parameters(), 0.01, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_codes_of_numbers_of_one_sign_keep_them(bits, sign):
    """The zero point lies within the codes: numbers far from zero on one side need zero among them."""
    from isogrid.optim.codes import decode_affine, encode_affine

    values = sign * (1 + 0.1 * torch.rand(65, 4, generator=torch.Generator().manual_seed(0)))
    codes, scale, zero = encode_affine(values, bits)
    found = decode_affine(codes, scale, zero, bits, (65, 4), torch.float32)
    assert float((found - values).abs().max()) <= float(values.abs().max()) / (2**bits - 1)
