"""The product behind Monarch, Block Tensor-Train and their kin: blocked product, re-index, blocked product."""

import torch
from torch import Tensor

# On a CPU, more rows than this are multiplied piece by piece: the intermediate then stays in its cache.
CHUNK_ROWS = 128
# Up to here a batched product with the rows on the left is faster (three- to tenfold on one core at 768 x 768).
FEW_ROWS = 8


def two_stage(x: Tensor, first: Tensor, second: Tensor, *, interleave: bool) -> Tensor:
    """Multiply rows by two block-diagonal matrices with the stride permutation between them.

    Args:
        x: ``(..., k * p)`` rows.
        first: ``(k, q, p)``; block ``c`` maps inputs ``c p … c p + p - 1`` to hidden units ``c q … c q + q - 1``.
        second: ``(l, s, r)`` with ``l * r == k * q``; hidden unit ``e`` belongs to block ``e mod l``.
        interleave: order of the outputs. True: output ``sigma * l + a`` is row ``sigma`` of block ``a``
            (Monarch, Dao et al. 2022). False: ``a * s + sigma`` (Block Tensor-Train, Qiu et al. 2024).

    Returns:
        ``(..., l * s)``, contiguous, in the dtype and on the device of ``x``.

    The intermediate is kept feature-major, ``(hidden, rows)``: then the permutation between the stages is a
    stride, never a copy, and one transposition at the end is the only data movement.
    """
    k, _, p = first.shape  # (k, q, p)
    rows = x.reshape(-1, k, p)  # (rows, k, p)
    if x.device.type == "cpu" and rows.shape[0] > CHUNK_ROWS and not torch.compiler.is_compiling():
        parts = [_two_stage(part, first, second, interleave) for part in rows.split(CHUNK_ROWS)]
        out = torch.cat(parts)
    else:
        out = _two_stage(rows, first, second, interleave)
    return out.view(*x.shape[:-1], out.shape[-1])


def _two_stage(rows: Tensor, first: Tensor, second: Tensor, interleave: bool) -> Tensor:
    """The product of rows ``(rows, k, p)``, contiguous ``(rows, l * s)``."""
    l, s, r = second.shape  # noqa: E741 - the field's letter for the second number of blocks
    hidden = torch.bmm(first, rows.permute(1, 2, 0))  # (k, q, rows), contiguous
    regrouped = hidden.reshape(r, l, -1).transpose(0, 1)  # (l, r, rows), a view
    if rows.shape[0] <= FEW_ROWS:
        out = torch.bmm(regrouped.mT, second.mT).permute(1, 2, 0)  # (rows, s, l)
    else:
        out = torch.bmm(second, regrouped).permute(2, 1, 0)  # (rows, s, l)
    return (out if interleave else out.mT).reshape(rows.shape[0], l * s).contiguous()
