"""Features in another order, and the first product of Low-Rank Light: some inputs as they are, and what others add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isogrid.kernels import native
from isogrid.kernels.blocked import dense_product


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """``x[..., order]`` where the order names each feature once.

    Rows are laid flat first: PyTorch gathers from three axes several times slower than from two. The gradient gathers
    by the inverse order: PyTorch's own, which must not assume that each feature comes once, adds them up one by one.

    Args:
        x: ``(..., features)``.
        order: ``(features,)``, a permutation.

    Returns:
        ``(..., features)``.
    """
    # What a compiler traces it differentiates and joins by itself; it takes no function with a forward derivative.
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _InOrder.apply(x, order)
    return _gathered(x, order)


def added_to_chosen(x: Tensor, order: Tensor, rest: Tensor) -> Tensor:
    """``x[order[:rank]] + rest · x[order[rank:]]`` of rows.

    Args:
        x: ``(..., in)``.
        order: ``(in,)`` int32, each input once.
        rest: ``(rank, in - rank)``.

    Returns:
        ``(..., rank)``.
    """
    rank, rows = rest.shape[0], x.shape[:-1].numel()
    flat = x.reshape(rows, x.shape[-1])
    if x.dtype != torch.bfloat16 or not _moves_natively(x, order, rest):
        chosen, others = in_order(flat, order).tensor_split([rank], dim=1)
    elif rows > 1:  # PyTorch's own gathering takes as long as the products in bfloat16
        chosen, others = torch.ops.isogrid.columns(flat, order, rank)
    else:  # one row waits for the weight, which the native product reads faster
        chosen, others = flat.index_select(1, order).tensor_split([rank], dim=1)
        return (chosen + dense_product(others, rest)).view(*x.shape[:-1], rank)
    return torch.addmm(chosen, others, rest.mT).view(*x.shape[:-1], rank)


class _InOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return _gathered(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return in_order(gradient, order.argsort()), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (order,) = ctx.saved_tensors
        return in_order(tangent, order)


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).index_select(1, order).view(x.shape)


def _moves_natively(x: Tensor, order: Tensor, rest: Tensor) -> bool:
    """Whether the native gathering takes these; it has no gradient, and knows nothing of autocast."""
    if torch.is_grad_enabled() and (x.requires_grad or rest.requires_grad):
        return False
    return not torch.is_autocast_enabled("cpu") and order.device.type == "cpu" and native.takes(x, rest)
