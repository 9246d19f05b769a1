"""Products of rows with block-diagonal matrices: one stage, two, or two with a coupling between.

What Monarch, Block Tensor-Train, BLAST and their kin multiply by. On a CPU that has them the native products serve
(`kernels.native`); everywhere else, and wherever a transform looks inside, the portable ones of this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.kernels import native

# On a CPU, more rows than this are multiplied piece by piece: the intermediate then stays in its cache.
CHUNK_ROWS = 128
# Up to here native products without gradients beat PyTorch's dense ones even where there is a single block.
FEW_DENSE_ROWS = 64
# Up to here a batched product with the rows on the left is faster (three- to tenfold on one core at 768 x 768).
FEW_ROWS = 8


def one_stage(
    x: Tensor,
    blocks: Tensor,
    *,
    in_turn: bool = False,
    out_turn: bool = False,
    features: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply rows by a block-diagonal matrix whose features are dealt to the blocks in order, or in turn.

    Args:
        x: ``(..., in)``, in at most ``k * p``; missing features are zeros.
        blocks: ``(k, q, p)``.
        in_turn: input ``j * k + c`` is number j of block c; else ``c * p + j`` is.
        out_turn: output ``t * k + c`` is number t of block c; else ``c * q + t`` is.
        features: the first so many outputs; None: all ``k * q``.
        bias: ``(features,)``, added within the product.

    Returns:
        ``(..., features)``, contiguous.
    """
    k, q, p = blocks.shape
    features = k * q if features is None else features
    if x.shape[-1] and native.takes(x, blocks):
        out: Tensor = torch.ops.isogrid.blocked(_flat(x), blocks, _like(bias, x), k, in_turn, out_turn, features)
        return _shaped(out, x)
    rows = pad_features(x, k * p).reshape(-1, k * p)
    dealt = rows.view(-1, p, k).permute(2, 0, 1) if in_turn else rows.view(-1, k, p).transpose(0, 1)
    if bias is None:
        out = torch.bmm(dealt, blocks.mT)  # (k, rows, q)
    else:
        out = torch.baddbmm(_dealt_bias(bias, x, k, q, out_turn).unsqueeze(1), dealt, blocks.mT)
    out = out.permute(1, 2, 0) if out_turn else out.transpose(0, 1)
    return out.reshape(len(rows), k * q)[:, :features].contiguous().view(*x.shape[:-1], features)


def low_rank_product(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by ``left · right``, the two products in one pass where rows are few.

    Args:
        x: ``(..., in)``.
        right: ``(rank, in)``.
        left: ``(out, rank)``.
        bias: ``(out,)``, added within the product.
    """
    if _few(x, right, left):
        return _second_dense(x, right.unsqueeze(0), left, bias)
    return torch.nn.functional.linear(torch.nn.functional.linear(x, right), left, _like(bias, x))


def block_dense_product(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by ``left · blockdiag(right)``, the two products in one pass where rows are few.

    Args:
        x: ``(..., in)``, in at most ``k * p``; missing features are zeros.
        right: ``(k, q, p)``.
        left: ``(out, k * q)``.
        bias: ``(out,)``, added within the product.
    """
    if _few(x, right, left):
        return _second_dense(x, right, left, bias)
    return torch.nn.functional.linear(one_stage(x, right), left, _like(bias, x))


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by a dense ``(out, in)`` factor, a bias ``(out,)`` added within the product."""
    if _few(x, weight):
        return one_stage(x, weight.unsqueeze(0), bias=bias)
    return torch.nn.functional.linear(x, weight, _like(bias, x))


def two_stage(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    interleave: bool,
    features: int | None = None,
    bias: Tensor | None = None,
    blocks: tuple[int, int] | None = None,
    in_runs: bool = False,
) -> Tensor:
    """Multiply rows by two block-diagonal matrices with a permutation of the hidden units between them.

    Args:
        x: ``(..., in)``, in at most ``k * p``; missing features are zeros.
        first: ``(k, q, p)``; block ``c`` maps inputs ``c p … c p + p - 1`` to hidden units ``c q … c q + q - 1``.
            ``(1, q, p)``: one for all blocks.
        second: ``(l, s, r)`` with ``l * r == k * q``, or ``(1, s, r)``.
        interleave: order of the outputs. True: output ``sigma * l + a`` is row ``sigma`` of block ``a``
            (Monarch, Dao et al. 2022). False: ``a * s + sigma`` (Block Tensor-Train, Qiu et al. 2024).
        features: the first so many outputs; None: all ``l * s``.
        bias: ``(features,)``, added within the product.
        blocks: ``(k, l)``; None: as many as the factors have.
        in_runs: which hidden unit is which. False: unit ``e = c q + t`` is number ``e // l`` of block ``e mod l``,
            the stride permutation. True: unit ``t`` of block ``c`` is number ``c n + t mod n`` of block ``t // n``
            with ``n = q / l``.

    Returns:
        ``(..., features)``, contiguous, in the dtype and on the device of ``x``.

    In the portable product the intermediate is kept feature-major, ``(hidden, rows)``: then the stride permutation is a
    stride, never a copy, and one transposition at the end is the only data movement.
    """
    k, l = (first.shape[0], second.shape[0]) if blocks is None else blocks  # noqa: E741 - the field's letter
    p, s = first.shape[2], second.shape[1]
    features = l * s if features is None else features
    if x.shape[-1] and native.takes(x, first, second):
        out: Tensor = torch.ops.isogrid.two_stage(
            _flat(x), first, second, _like(bias, x), (k, l), in_runs, interleave, features
        )
        return _shaped(out, x)
    first, second = first.expand(k, -1, -1), second.expand(l, -1, -1)
    added = None if bias is None else _dealt_bias(bias, x, l, s, interleave)
    rows = pad_features(x, k * p).reshape(-1, k, p)  # (rows, k, p)
    if x.device.type == "cpu" and rows.shape[0] > CHUNK_ROWS and not torch.compiler.is_compiling():
        parts = [_two_stage(part, first, second, interleave, in_runs, added) for part in rows.split(CHUNK_ROWS)]
        out = torch.cat(parts)
    else:
        out = _two_stage(rows, first, second, interleave, in_runs, added)
    return out[:, :features].contiguous().view(*x.shape[:-1], features)


def coupled_stages(
    x: Tensor,
    right: Tensor,
    coupling: Tensor,
    left: Tensor,
    *,
    features: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply rows by ``left[i] · Σ_j diag(coupling[i, j]) · right[j]``, block row by block row (BLAST).

    Args:
        x: ``(..., in)``, in at most ``b * p``; missing features are zeros.
        right: ``(b, r, p)``.
        coupling: ``(b, b, r)``, row blocks first.
        left: ``(b, s, r)``.
        features: the first so many outputs; None: all ``b * s``.
        bias: ``(features,)``, added within the product.

    Returns:
        ``(..., features)``, contiguous.
    """
    b, _, p = right.shape
    s = left.shape[1]
    features = b * s if features is None else features
    if x.shape[-1] and native.takes(x, right, coupling, left):
        out: Tensor = torch.ops.isogrid.blast(_flat(x), right, coupling, left, _like(bias, x), features)
        return _shaped(out, x)
    rows = pad_features(x, b * p).reshape(-1, b, p)
    hidden = torch.bmm(right, rows.permute(1, 2, 0))  # (column blocks, rank, rows)
    mixed = torch.bmm(coupling.permute(2, 0, 1), hidden.transpose(0, 1)).transpose(0, 1)  # (row blocks, rank, rows)
    if bias is None:
        out = torch.bmm(left, mixed)  # (row blocks, s, rows)
    else:
        out = torch.baddbmm(_dealt_bias(bias, x, b, s, False).unsqueeze(2), left, mixed)
    out = out.permute(2, 0, 1).reshape(len(rows), b * s)
    return out[:, :features].contiguous().view(*x.shape[:-1], features)


def pad_features(x: Tensor, features: int) -> Tensor:
    """Zeros appended to the last axis up to ``features``; itself when nothing is missing. Never truncates."""
    missing = features - x.shape[-1]
    if missing < 0:
        raise IsogridError(f"input has {x.shape[-1]} features, at most {features} are expected")
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def _few(x: Tensor, *factors: Tensor) -> bool:
    """Whether a native product beats PyTorch's dense ones: few rows and no gradients; in float16 always."""
    few = x.dtype == torch.float16 or x.shape[:-1].numel() <= FEW_DENSE_ROWS
    if not few or not x.shape[-1] or not native.takes(x, *factors):
        return False
    return (
        x.dtype == torch.float16
        or not torch.is_grad_enabled()
        or not any(value.requires_grad for value in (x, *factors))
    )


def _second_dense(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
    """The native product with one block ``left`` in the second stage."""
    out: Tensor = torch.ops.isogrid.two_stage(
        _flat(x), right, left.unsqueeze(0), _like(bias, x), (right.shape[0], 1), False, False, left.shape[0]
    )
    return _shaped(out, x)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(out: Tensor, x: Tensor) -> Tensor:
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def _dealt_bias(bias: Tensor, x: Tensor, blocks: int, size: int, in_turn: bool) -> Tensor:
    """``(blocks, size)``: what each output of each block has added."""
    whole = pad_features(bias.to(x.dtype), blocks * size)
    return whole.view(size, blocks).T if in_turn else whole.view(blocks, size)


def _two_stage(
    rows: Tensor, first: Tensor, second: Tensor, interleave: bool, in_runs: bool, bias: Tensor | None
) -> Tensor:
    """The product of rows ``(rows, k, p)``, ``(rows, l * s)``."""
    l, s, r = second.shape  # noqa: E741 - the field's letter for the second number of blocks
    k, q, p = first.shape
    if in_runs and rows.shape[0] >= p:  # fewer weights than hidden numbers: those are moved, here and not below
        first = first.reshape(k, l, q // l, p).transpose(1, 2).reshape(k, q, p)
    hidden = torch.bmm(first, rows.permute(1, 2, 0))  # (k, q, rows), contiguous
    if in_runs and rows.shape[0] < p:
        regrouped = hidden.view(k, l, q // l, -1).transpose(0, 1).reshape(l, r, -1)
    else:
        regrouped = hidden.reshape(r, l, -1).transpose(0, 1)  # (l, r, rows), a view
    if rows.shape[0] <= FEW_ROWS:
        product = (regrouped.mT, second.mT)  # (l, rows, s)
        out = torch.bmm(*product) if bias is None else torch.baddbmm(bias.unsqueeze(1), *product)
        out = out.permute(1, 2, 0)  # (rows, s, l)
    else:
        out = torch.bmm(second, regrouped) if bias is None else torch.baddbmm(bias.unsqueeze(2), second, regrouped)
        out = out.permute(2, 1, 0)  # (rows, s, l)
    return (out if interleave else out.mT).reshape(rows.shape[0], l * s)
