"""The two-stage product against what it is: two block-diagonal matrices with the stride permutation between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isogrid.kernels import blocked, two_stage
from tests.formats.cases import gaussian

# k, q, p, l, s, r with l r = k q
SIZES = [
    (3, 4, 5, 2, 7, 6),
    (4, 4, 4, 4, 3, 4),
    (1, 6, 5, 1, 4, 6),
    (2, 3, 4, 6, 1, 1),
    (5, 1, 1, 1, 2, 5),
    (1, 1, 1, 1, 1, 1),
]


def factors(sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    k, q, p, l, s, r = sizes  # noqa: E741
    return gaussian(k, q, p, dtype=dtype), gaussian(l, s, r, seed=1, dtype=dtype)


def as_einsum(x: Tensor, first: Tensor, second: Tensor, interleave: bool) -> Tensor:
    """The recipe of Dao et al. 2022 as the method page writes it."""
    (k, _, p), (l, s, r) = first.shape, second.shape  # noqa: E741
    hidden = torch.einsum("kqp,bkp->bkq", first, x.reshape(-1, k, p)).reshape(-1, r, l)
    return torch.einsum("lsr,brl->bsl" if interleave else "lsr,brl->bls", second, hidden).reshape(-1, l * s)


def as_block_diagonals(x: Tensor, first: Tensor, second: Tensor, interleave: bool) -> Tensor:
    """``[P] blockdiag(second) P blockdiag(first) x`` with explicit matrices and index shuffles."""
    l, s, r = second.shape  # noqa: E741
    hidden = x.reshape(-1, x.shape[-1]) @ torch.block_diag(*first).T
    dealt = hidden[:, torch.arange(r * l).view(r, l).T.ravel()]
    y = dealt @ torch.block_diag(*second).T
    return y[:, torch.arange(l * s).view(l, s).T.ravel()] if interleave else y


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_three_formulations_agree(sizes: tuple[int, ...], interleave: bool) -> None:
    first, second = factors(sizes)
    x = gaussian(6, sizes[0] * sizes[2], seed=2)
    y = two_stage(x, first, second, interleave=interleave)
    assert torch.allclose(y, as_einsum(x, first, second, interleave), rtol=1e-12, atol=1e-12)
    assert torch.allclose(y, as_block_diagonals(x, first, second, interleave), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleave", [True, False])
def test_leading_dimensions_and_dtype(interleave: bool, dtype: torch.dtype) -> None:
    first, second = factors(SIZES[0], dtype)
    n, m = 15, 14
    for lead in ((), (1,), (2, 3), (2, 1, 2, 2), (0,), (3, 0)):
        x = gaussian(*lead, n, seed=2, dtype=dtype)
        y = two_stage(x, first, second, interleave=interleave)
        assert y.shape == (*lead, m)
        assert y.dtype == dtype
        flat = two_stage(x.reshape(-1, n), first, second, interleave=interleave)
        assert torch.equal(y.reshape(-1, m), flat)


@pytest.mark.parametrize("interleave", [True, False])
def test_inputs_and_factors_that_are_not_contiguous(interleave: bool) -> None:
    first, second = factors(SIZES[0])
    x = gaussian(15, 4, 3, seed=2)
    straight = two_stage(x.permute(2, 1, 0).contiguous(), first, second, interleave=interleave)
    assert torch.allclose(two_stage(x.permute(2, 1, 0), first, second, interleave=interleave), straight)
    strided = gaussian(3, 30, seed=3)[:, ::2]
    turned_first, turned_second = first.mT.contiguous().mT, second.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    y = two_stage(strided, turned_first, turned_second, interleave=interleave)
    assert torch.allclose(y, as_einsum(strided, first, second, interleave))


@pytest.mark.parametrize("interleave", [True, False])
def test_gradients(interleave: bool) -> None:
    first, second = (value.requires_grad_() for value in factors((2, 3, 2, 3, 2, 2)))
    x = gaussian(2, 4, seed=2).requires_grad_()

    def product(*leaves: Tensor) -> Tensor:
        return two_stage(*leaves, interleave=interleave)

    assert torch.autograd.gradcheck(product, (x, first, second))
    assert torch.autograd.gradgradcheck(product, (x, first, second))
    empty = two_stage(gaussian(0, 4).requires_grad_(), first, second, interleave=interleave)
    grads = torch.autograd.grad(empty.sum(), (first, second))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("rows", [1, blocked.FEW_ROWS, blocked.FEW_ROWS + 1, 2 * blocked.CHUNK_ROWS + 1])
@pytest.mark.parametrize("interleave", [True, False])
def test_every_number_of_rows_gives_the_same_rows(rows, interleave):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    second = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, 15, generator=generator, dtype=torch.float64)
    out = two_stage(x, first, second, interleave=interleave)
    single = torch.cat([two_stage(row, first, second, interleave=interleave) for row in x.split(1)])
    torch.testing.assert_close(out, single)
    assert out.is_contiguous()
