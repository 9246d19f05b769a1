"""Products with values and a mask: from what is stored, against the scattered matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isogrid import StructuredLinear
from isogrid.kernels import native, pack_mask, scattered, sparse_product

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def held(m: int, n: int, density: float, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=source) < density
    return torch.randn(int(mask.sum()), generator=source).to(dtype), pack_mask(mask)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 150),
    rows=st.integers(0, 6),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_product_is_that_of_the_scattered_matrix(
    m: int, n: int, rows: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    values, mask = held(m, n, density, dtype, seed)
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = sparse_product(x, values, mask)
    wanted = x.double() @ scattered(values, mask, n).double().mT
    size = x.double().norm() * scattered(values, mask, n).double().norm()
    assert found.shape == (rows, m)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= BOUNDS[dtype] * size


def test_values_are_read_no_further_than_they_go() -> None:
    # The last values lie at the end of a larger tensor: what stands behind them is no number.
    values, mask = held(9, 70, 0.5, torch.float32, 3)
    longer = torch.cat([values, torch.full((64,), torch.nan)])[: len(values)]
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sparse_product(x, longer, mask), sparse_product(x, values, mask))


def test_gradients_and_views() -> None:
    values, mask = held(5, 12, 0.5, torch.float64, 1)
    x = torch.randn(2, 3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: sparse_product(x, v, mask), (x, values.requires_grad_()))
    flat = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
    single = values.detach().float()
    assert torch.allclose(sparse_product(flat, single, mask), flat @ scattered(single, mask, 12).mT, atol=1e-5)


@pytest.mark.skipif(not native.loaded(), reason="no native products on this machine")
def test_wrong_sizes_are_refused() -> None:
    values, mask = held(5, 12, 0.5, torch.float32, 1)
    with pytest.raises(RuntimeError, match="values for"):
        torch.ops.isogrid.sparse(torch.zeros(1, 12), values[:-1], mask)
    with pytest.raises(RuntimeError, match="bytes for 20 inputs"):
        torch.ops.isogrid.sparse(torch.zeros(1, 20), values, mask)
    with pytest.raises(RuntimeError, match="one to 4 rows"):
        torch.ops.isogrid.sparse(torch.zeros(5, 12), values, mask)


def test_training_compiling_and_autocast_take_the_scattered_matrix() -> None:
    layer = StructuredLinear(20, 12, "semi_structured", generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    wanted = x @ layer.dense().mT + layer.bias
    layer(x).sum().backward()
    assert layer.values.grad is not None
    assert torch.allclose(layer.eval()(x), wanted, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), wanted, atol=1e-5)
