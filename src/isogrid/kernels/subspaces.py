"""What a step in a subspace of a gradient is made of: squared norms, coordinates, Adam's moments, the lift.

A gradient ``G`` and its weight are ``(m, n)``. On a CPU that has them the native products serve: they read a gradient
once a product, at the speed of large ones even where the subspace is thin, and write the weight once. Everywhere else,
and in other precisions than float32, the portable ones of this file do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.kernels import native

# Numbers in a block that stays in a core's cache.
CACHED = 2**17
# On a CPU a Python number costs nothing; on a GPU it would be waited for.
Scalar = Tensor | float


def scalar(value: Tensor) -> Scalar:
    """A Python number of a tensor on the CPU; on other devices the tensor."""
    return value if value.device.type != "cpu" else value.item()


def squared_norm(values: Tensor) -> Scalar:
    """Squared Frobenius norm."""
    norm = scalar(torch.linalg.vector_norm(values))
    return norm * norm


def takes(*tensors: Tensor) -> bool:
    """Whether the native products of this file serve."""
    if tensors[0].dtype != torch.float32 or torch.compiler.is_compiling() or not native.takes(*tensors):
        return False
    return all(tensor.is_contiguous() for tensor in tensors)


def channel_squares(gradient: Tensor, of_rows: bool) -> tuple[Tensor, Scalar]:
    """Squared norms of the rows, ``(m, 1)``, or of the columns, ``(1, n)``, and their sum.

    Not finite where an entry is not, or where its square, which Adam forms anyway, is not.
    """
    if takes(gradient):
        found, total = torch.ops.isogrid.channel_squares(gradient, of_rows)
        return found, total
    if of_rows or gradient.is_cuda:
        squares = torch.linalg.vector_norm(gradient, dim=1 if of_rows else 0, keepdim=True).square()
        return squares, scalar(squares.sum())
    # Down the columns torch's norm is slow on a CPU: squares are summed block by block, each within the cache.
    squares = gradient.new_zeros(1, gradient.shape[1])
    for block in gradient.split(max(1, CACHED // max(gradient.shape[1], 1))):
        squares += block.square().sum(0)
    return squares, scalar(squares.sum())


def channel_scales_(
    squares: Tensor, held: Tensor, *, beta2: float, count: int, step: int, eps: float
) -> tuple[Tensor, Scalar]:
    """Update running mean squares of channels, ``q <- b2 q + (1 - b2) s / count``, and scale channels to unit size.

    Args:
        squares: s, squared norms of the channels.
        held: q, updated in place.
        beta2: b2.
        count: numbers in a channel.
        step: how many updates this one makes, from 1.
        eps: added to the root.

    Returns:
        The scales ``a = 1 / (sqrt(q / (1 - b2^step)) + eps)``, and the sum of ``a² s``.
    """
    correction = 1 - beta2**step
    if takes(squares, held):
        found, total = torch.ops.isogrid.channel_scales_(squares, held, beta2, (1 - beta2) / count, correction, eps)
        return found, total
    held.mul_(beta2).add_(squares, alpha=(1 - beta2) / count)
    scales = 1 / ((held / correction).sqrt() + eps)
    return scales, scalar((scales.square() * squares).sum())


def coordinates(gradient: Tensor, basis: Tensor, left: bool, scales: Tensor | None = None) -> tuple[Tensor, Scalar]:
    """Coordinates in a basis, and the sum of their squares.

    Args:
        gradient: G.
        basis: ``(m, r)`` on the left, ``(n, r)`` on the right.
        left: ``Pᵀ G``, ``(r, n)``; else ``G P``, ``(m, r)``.
        scales: of the rows of G, ``(m, 1)``, on the left, of its columns, ``(1, n)``, on the right; None for none.
            They are put into the thin basis.
    """
    given = (gradient, basis) if scales is None else (gradient, basis, scales)
    if takes(*given):
        found, squared = torch.ops.isogrid.coordinates(gradient, basis, left, scales)
        return found, squared
    if scales is not None:
        basis = basis * (scales if left else scales.mT)
    found = basis.mT @ gradient if left else gradient @ basis
    return found, squared_norm(found)


def moments_(
    gradient: Tensor, first: Tensor, second: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Scalar, Scalar]:
    """Update Adam's moments in place: ``m <- b1 m + (1 - b1) R``, ``v <- b2 v + (1 - b2) R²``.

    Args:
        gradient: R.
        first: m.
        second: v.
        betas: b1 and b2.
        eps: added to the root.

    Returns:
        The direction ``m / (sqrt(v) + eps)``, its squared norm, and that of the direction without momentum,
        ``R / (sqrt(v) + eps)``.
    """
    if takes(gradient, first, second):
        direction, slow, fast = torch.ops.isogrid.moments_(gradient, first, second, *betas, eps)
        return direction, slow, fast
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = second.sqrt().add_(eps)
    direction = first / root
    return direction, squared_norm(direction), squared_norm(torch.div(gradient, root, out=root))


def lift_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    size: float,
    gradient: Tensor | None = None,
    factor: Tensor | None = None,
    before: float = 1.0,
    after: float = 1.0,
) -> Tensor:
    """``W <- after (before W - size (left right + factor ∘ G))``, in place.

    Args:
        weight: W.
        left: ``(m, r)``.
        right: ``(r, n)``.
        size: of the step.
        gradient: G.
        factor: one for each row, ``(m, 1)``, for each column, ``(1, n)``, or for all; None leaves G out.
        before: what W shrinks to first.
        after: what everything shrinks to at last.
    """
    turned = not right.is_contiguous()
    thin = right.mT if turned else right
    given = (weight, left, thin) if gradient is None or factor is None else (weight, left, thin, gradient, factor)
    if takes(*given):
        also = (None, None) if len(given) == 3 else given[3:]
        torch.ops.isogrid.lift_(weight, left, thin, turned, *also, before, size, after)
        return weight
    weight.addmm_(left, right, beta=before, alpha=-size)
    if gradient is not None and factor is not None:
        weight.addcmul_(gradient, factor, value=-size)
    return weight if after == 1 else weight.mul_(after)
