"""The product behind Monarch, Block Tensor-Train and their kin: blocked product, re-index, blocked product."""

import torch
from torch import Tensor


def two_stage(x: Tensor, first: Tensor, second: Tensor, *, interleave: bool) -> Tensor:
    """Multiply rows by two block-diagonal matrices with the stride permutation between them.

    Args:
        x: ``(..., k * p)`` rows.
        first: ``(k, q, p)``; block ``c`` maps inputs ``c p … c p + p - 1`` to hidden units ``c q … c q + q - 1``.
        second: ``(l, s, r)`` with ``l * r == k * q``; hidden unit ``e`` belongs to block ``e mod l``.
        interleave: order of the outputs. True: output ``sigma * l + a`` is row ``sigma`` of block ``a``
            (Monarch, Dao et al. 2022). False: ``a * s + sigma`` (Block Tensor-Train, Qiu et al. 2024).

    Returns:
        ``(..., l * s)`` in the dtype and on the device of ``x``.

    The intermediate is kept feature-major, ``(hidden, rows)``: then the permutation between the stages is a
    stride, never a copy, and one transposition at the end is the only data movement.
    """
    k, _, p = first.shape  # (k, q, p)
    l, s, r = second.shape  # noqa: E741 - the field's letter for the second number of blocks
    rows = x.reshape(-1, k, p)  # (rows, k, p)
    hidden = torch.bmm(first, rows.permute(1, 2, 0))  # (k, q, rows), contiguous
    regrouped = hidden.reshape(r, l, -1).transpose(0, 1)  # (l, r, rows), a view
    out = torch.bmm(second, regrouped)  # (l, s, rows)
    out = out.permute(2, 1, 0) if interleave else out.permute(2, 0, 1)
    return out.reshape(*x.shape[:-1], l * s)
