"""The first product of Low-Rank Light: some inputs as they are, and what the others add to them."""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.kernels import native
from isogrid.kernels.blocked import FEW_DENSE_ROWS, dense_product


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
    # PyTorch's own gathering is as fast in float32, and takes as long as the products in bfloat16.
    if rows > FEW_DENSE_ROWS and x.dtype == torch.bfloat16 and _moves_natively(x, order, rest):
        chosen, others = torch.ops.isogrid.columns(x.reshape(rows, x.shape[-1]), order, rank)
        return torch.addmm(chosen, others, rest.mT).view(*x.shape[:-1], rank)
    gathered = x.index_select(-1, order)
    return gathered[..., :rank] + dense_product(gathered[..., rank:], rest)


def _moves_natively(x: Tensor, order: Tensor, rest: Tensor) -> bool:
    """Whether the native gathering takes these; it has no gradient, and knows nothing of autocast."""
    if torch.is_grad_enabled() and (x.requires_grad or rest.requires_grad):
        return False
    return not torch.is_autocast_enabled("cpu") and order.device.type == "cpu" and native.takes(x, rest)
