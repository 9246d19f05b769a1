"""Products with matrices held as their nonzero values and a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.kernels import native
from isogrid.kernels.bits import unpack_mask

# Up to here reading the values and the mask beats reading zeros.
FEW_ROWS = 4


def scattered(values: Tensor, mask: Tensor, features: int) -> Tensor:
    """``(out, features)`` with the values, in row-major order, where the mask has ones; differentiable in the values.

    Args:
        values: ``(nonzeros,)``.
        mask: ``(out, ceil(features / 8))`` uint8 of `pack_mask`.
        features: columns.
    """
    zeros = torch.zeros(len(mask), features, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(unpack_mask(mask, features), values)


def sparse_product(x: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Multiply rows ``(..., in)`` by the matrix of `scattered`; few rows, outside of training, from what is stored.

    Args:
        x: ``(..., in)``.
        values: ``(nonzeros,)``.
        mask: ``(out, ceil(in / 8))`` uint8.
    """
    rows = x.shape[:-1].numel()
    if 0 < rows <= FEW_ROWS and x.shape[-1] and _multiplies_as_stored(x, values, mask):
        out: Tensor = torch.ops.isogrid.sparse(x.reshape(rows, x.shape[-1]), values, mask)
        return out.view(*x.shape[:-1], len(mask))
    return torch.nn.functional.linear(x, scattered(values, mask, x.shape[-1]))


def _multiplies_as_stored(x: Tensor, values: Tensor, mask: Tensor) -> bool:
    """Whether the native product takes these; it has no gradient, and knows nothing of autocast."""
    if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        return False
    return not torch.is_autocast_enabled("cpu") and mask.device.type == "cpu" and native.takes(x, values)
