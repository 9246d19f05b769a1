"""Chosen inputs and what the others add: the native gathering beside PyTorch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isogrid.kernels import added_to_chosen, in_order, native_takes
from isogrid.kernels.blocked import FEW_DENSE_ROWS

NATIVE = native_takes(torch.ones(1, 1, dtype=torch.bfloat16))
needs_native = pytest.mark.skipif(not NATIVE, reason="no native products here")


def problem(rows, features, rank, dtype, seed=0):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=source).to(dtype)
    order = torch.randperm(features, generator=source).to(torch.int32)
    rest = torch.randn(rank, features - rank, generator=source).to(dtype)
    return x, order, rest


def by_hand(x, order, rest):
    x, rank = x.double(), len(rest)
    return x[..., order[:rank].long()] + x[..., order[rank:].long()] @ rest.double().mT


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.integers(1, 70), st.data(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_sizes(rows, features, data, dtype):
    rank = data.draw(st.integers(0, features))
    x, order, rest = problem(rows, features, rank, dtype)
    with torch.no_grad():
        found = added_to_chosen(x, order, rest)
    assert found.dtype == dtype
    assert found.shape == (rows, rank)
    scale = 1e-5 if dtype == torch.float32 else 2e-2
    wanted = by_hand(x, order, rest)
    assert torch.allclose(found.double(), wanted, rtol=scale, atol=scale * (1 + features**0.5))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_are_moved_bit_by_bit(dtype):
    x, order, _ = problem(77, 33, 5, dtype)
    first, rest = torch.ops.isogrid.columns(x[:, ::1], order, 5)
    assert torch.equal(first, x[:, order[:5].long()])
    assert torch.equal(rest, x[:, order[5:].long()])
    turned = x.mT.contiguous().mT
    assert torch.equal(torch.ops.isogrid.columns(turned, order, 5)[1], rest)


@needs_native
def test_an_order_beyond_the_inputs_is_refused():
    x, order, _ = problem(3, 8, 2, torch.bfloat16)
    order[3] = 8
    with pytest.raises(IndexError, match="numbers from 0 to 7"):
        torch.ops.isogrid.columns(x, order, 2)


def test_gradients_and_more_axes():
    rows = 2 * FEW_DENSE_ROWS
    x, order, rest = problem(rows, 12, 4, torch.float64)
    x.requires_grad_()
    rest.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: added_to_chosen(a[:3], order, b), (x, rest))
    with torch.no_grad():
        flat = added_to_chosen(x.bfloat16(), order, rest.bfloat16())
        deep = added_to_chosen(x.bfloat16().view(2, -1, 1, 12), order, rest.bfloat16())
    assert torch.equal(deep.view(rows, 4), flat)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 9), st.integers(0, 99))
def test_features_in_order_and_their_gradient(leading, features, seed):
    source = torch.Generator().manual_seed(seed)
    order = torch.randperm(features, generator=source)
    x = torch.randn(*leading, features, generator=source).requires_grad_()
    gradient = torch.randn(*leading, features, generator=source)
    found, wanted = in_order(x, order.int()), x[..., order]
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, wanted)))


def test_features_in_order_under_transforms():
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=source, dtype=torch.float64, requires_grad=True)
    orders = torch.stack([torch.randperm(5, generator=source) for _ in range(4)])

    def moved(x, order=orders[0]):
        return in_order(x, order)

    def weighed(x, order):
        return (in_order(x, order) ** 3 * torch.arange(5)).sum()

    assert torch.autograd.gradcheck(moved, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(moved, x)
    apart = torch.stack([torch.func.grad(weighed)(x.detach(), order) for order in orders])
    assert torch.equal(torch.func.vmap(torch.func.grad(weighed), in_dims=(None, 0))(x.detach(), orders), apart)
    compiled = torch.compile(moved, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.allclose(gradient, 2 * x)
