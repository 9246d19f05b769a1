"""Products with matrices held as their nonzero values and a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.kernels.bits import unpack_mask


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
    """Multiply rows ``(..., in)`` by the matrix of `scattered`.

    Args:
        x: ``(..., in)``.
        values: ``(nonzeros,)``.
        mask: ``(out, ceil(in / 8))`` uint8.
    """
    return torch.nn.functional.linear(x, scattered(values, mask, x.shape[-1]))
