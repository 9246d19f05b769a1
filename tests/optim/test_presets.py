"""Every preset against its definition, written out step by step."""

from itertools import pairwise

import pytest
import torch

from isogrid.optim import (
    ProjectedAdamW,
    apollo,
    apollo_mini,
    default,
    fira,
    galore,
    golore,
    ldadam,
    q_galore,
    rsvd_adam,
    top_r,
)
from tests.optim import definitions

LR, DECAY, RANK, REFRESH = 0.02, 0.1, 3, 4
SHAPES = [(9, 14), (14, 9), (10, 10)]
CASES = {
    "default": (
        lambda p: default(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY),
        lambda w: definitions.Normalized(w, LR, DECAY, RANK, REFRESH),
    ),
    "default, limited": (
        lambda p: default(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY, limiter=1.01),
        lambda w: definitions.Normalized(w, LR, DECAY, RANK, REFRESH, limited=True),
    ),
    "rsvd_adam": (
        lambda p: rsvd_adam(p, LR, rank_fraction=0.3, refresh=REFRESH, weight_decay=DECAY),
        lambda w: definitions.RSVDAdam(w, LR, DECAY, RANK, REFRESH, fraction=0.3, decoupled=False),
    ),
    "rsvd_adam, decoupled, svt": (
        lambda p: rsvd_adam(
            p, LR, rank_fraction=0.3, refresh=REFRESH, weight_decay=DECAY, decoupled=True, svt=True, power_steps=1
        ),
        lambda w: definitions.RSVDAdam(w, LR, DECAY, RANK, REFRESH, fraction=0.3, decoupled=True, svt=True),
    ),
    "rsvd_adam, every step": (
        lambda p: rsvd_adam(p, LR, rank_fraction=0.3, refresh=1, weight_decay=DECAY),
        lambda w: definitions.RSVDAdam(w, LR, DECAY, RANK, 1, fraction=0.3, decoupled=False),
    ),
    "galore": (
        lambda p: galore(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY),
        lambda w: definitions.GaLore(w, LR, DECAY, RANK, REFRESH),
    ),
    "golore": (
        lambda p: golore(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY),
        lambda w: definitions.GoLore(w, LR, DECAY, RANK, REFRESH),
    ),
    "fira": (
        lambda p: fira(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY),
        lambda w: definitions.Fira(w, LR, DECAY, RANK, REFRESH),
    ),
    "fira, published code": (
        lambda p: fira(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY, scale=2.0, residual_of_scaled=True),
        lambda w: definitions.Fira(w, LR, DECAY, RANK, REFRESH, scale=2.0, code=True),
    ),
    "apollo": (
        lambda p: apollo(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY, scale=2.0),
        lambda w: definitions.Apollo(w, LR, DECAY, RANK, REFRESH, scale=2.0),
    ),
    "apollo, scaled first": (
        lambda p: apollo(p, LR, rank=RANK, refresh=REFRESH, weight_decay=DECAY, scale=2.0, scale_first=True),
        lambda w: definitions.Apollo(w, LR, DECAY, RANK, REFRESH, scale=2.0, front=True),
    ),
    "apollo_mini": (
        lambda p: apollo_mini(p, LR, refresh=REFRESH, weight_decay=DECAY),
        lambda w: definitions.Apollo(w, LR, DECAY, 1, REFRESH, scale=128.0, whole=True),
    ),
    "ldadam": (
        lambda p: ldadam(p, LR, rank=RANK, weight_decay=DECAY),
        lambda w: definitions.LDAdam(w, LR, DECAY, RANK, 1, feedback=True),
    ),
    "ldadam, no feedback": (
        lambda p: ldadam(p, LR, rank=RANK, weight_decay=DECAY, error_feedback=False),
        lambda w: definitions.LDAdam(w, LR, DECAY, RANK, 1, feedback=False),
    ),
    "top_r": (
        lambda p: top_r(p, LR, fraction=0.3, weight_decay=DECAY),
        lambda w: definitions.TopR(w, LR, DECAY, 1, 1, fraction=0.3),
    ),
}


def gradients(shape, count, seed=1):
    """Gradients of a falling spectrum that turn slowly, float64."""
    draw = torch.Generator().manual_seed(seed)
    short = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], short, generator=draw, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], short, generator=draw, dtype=torch.float64)).Q
    sigma = torch.arange(1, short + 1, dtype=torch.float64) ** -0.7
    for _ in range(count):
        yield u * sigma @ v.mT + 0.1 * torch.randn(shape, generator=draw, dtype=torch.float64)


def agree(make, define, shape, steps=10, tolerance=1e-8):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer, definition = make([parameter]), define(weight)
    for gradient in gradients(shape, steps):
        parameter.grad = gradient.clone()
        optimizer.step()
        definition.step(gradient)
        assert torch.equal(parameter.grad, gradient), "a step leaves the gradient alone"
        assert (parameter.detach() - definition.w).abs().max() <= tolerance
    assert (parameter.detach() - weight).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_those_of_the_definition(case, shape):
    make, define = CASES[case]
    agree(make, define, shape)


@pytest.mark.parametrize("shape", [(24, 256), (256, 24)])
def test_q_galore_stores_codes_as_its_definition_does(shape):
    agree(
        lambda p: q_galore(p, LR, rank=16, refresh=1, weight_decay=DECAY, adaptive={"queue": 2}),
        lambda w: definitions.QGaLore(w, LR, DECAY, 16, 1, queue=2),
        shape,
    )


def test_known_answer_of_galore():
    """Document, section 4: two steps by hand."""
    w = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = galore([w], 0.1, rank=1, side="left", scale=0.5, eps=1e-30)
    w.grad = torch.tensor([[3.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    optimizer.step()
    assert torch.allclose(w.detach(), torch.tensor([[-0.05, 0, 0], [0, 0, 0]], dtype=torch.float64), atol=1e-15)
    w.grad = torch.tensor([[1.0, 1, 0], [2, 0, 0]], dtype=torch.float64)
    optimizer.step()
    wanted = torch.tensor([[-0.0935532, -0.0372068, 0], [0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(w.detach(), wanted, atol=5e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_identity_at_full_rank_is_torchs_adam(shape, decoupled):
    start = torch.randn(shape, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    options = {"projector": "identity", "residual": "none", "transition": "keep", "refresh": 3}
    one = ProjectedAdamW([ours], LR, min(shape), weight_decay=DECAY, decoupled=decoupled, **options)
    other = cls([theirs], LR, weight_decay=DECAY)
    for gradient in gradients(shape, 10):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
        assert (ours - theirs).abs().max() <= 1e-10


@pytest.mark.parametrize("projector", ["svd", "randomized", "power", "random_orthonormal", "identity"])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_momentum_and_at_full_rank_every_basis_is_sgd(shape, projector):
    start = torch.randn(shape, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = ProjectedAdamW([ours], LR, min(shape), core="sgd", residual="none", projector=projector, refresh=3)
    other = torch.optim.SGD([theirs], LR)
    for gradient in gradients(shape, 10):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
        assert (ours - theirs).abs().max() <= 1e-10


@pytest.mark.parametrize("shape", [(10,), (3, 4, 2), (6, 5)])
def test_what_is_not_projected_is_torchs_adamw(shape):
    start = torch.randn(shape, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one = ProjectedAdamW([{"params": [ours], "rank": None}], LR, weight_decay=DECAY)
    other = torch.optim.AdamW([theirs], LR, weight_decay=DECAY)
    for gradient in gradients((1, start.numel()), 5):
        ours.grad = theirs.grad = gradient.view(shape).clone()
        one.step()
        other.step()
        assert (ours - theirs).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo_mini", "default, limited", "fira, published code"])
@pytest.mark.parametrize("zero", [0, 3])
def test_a_gradient_of_zeros_does_not_stop_what_the_limiter_lets_grow(name, zero):
    weight = torch.nn.Parameter(torch.zeros(9, 14))
    optimizer = CASES[name][0]([weight])
    draw = torch.Generator().manual_seed(0)
    moved, norms = [], []
    for step in range(8):
        before = weight.detach().clone()
        weight.grad = torch.randn(9, 14, generator=draw) * (step != zero)
        optimizer.step()
        moved.append(float((weight.detach() - before).norm()))
        norms.append(float(optimizer.state[weight]["residual_norm"]))
    assert min(moved[zero + 1 :]) > 0.1 * max(moved)
    assert norms[zero] == (norms[zero - 1] if zero else 0)
    for before, after in pairwise(norms[1:]):
        assert 0 < after <= 1.01 * before * (1 + 1e-5)
