"""What a method does with the part of the gradient that the subspace does not hold.

Every rule is written as ``update = lift(K) + φ ∘ G`` with small ``K`` and ``φ``: the full-size residual
``G - P Pᵀ G`` is never formed, and the weight is written twice at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.kernels.subspaces import Scalar, channel_scales_, channel_squares
from isogrid.optim.moments import State
from isogrid.optim.sharding import GradientMatrix, local

TINY = 1e-8


@dataclass
class Update:
    """``lift(coordinates) + factor ∘ G``; either may be None.

    Attributes:
        coordinates: in the subspace, of the moments' shape.
        factor: broadcasts against the gradient: ``(1, n)``, ``(rows here, 1)`` or a scalar.
    """

    coordinates: Tensor | None
    factor: Tensor | None = None


def limited(norm: Tensor, state: State, growth: float | None) -> Scalar:
    """What a residual of this norm is divided by so that it grows at most by a factor a step (Fira, section 3.3).

    A residual of zero, as of a gradient of zeros, says nothing of how large the next may be: the norm before it stays.
    """
    if growth is None:
        return 1.0
    before = state.get("residual_norm")
    if before is None:
        before = torch.zeros_like(norm)
    grown = (norm / (before + TINY)).clamp(min=growth) / growth
    divisor = torch.where(before > 0, grown, torch.ones_like(grown))
    state["residual_norm"] = torch.where(norm > 0, norm / divisor, before)
    return divisor


def fira(
    gradient: GradientMatrix,
    side: str,
    coordinates: Tensor,
    direction: Tensor,
    state: State,
    *,
    scale: float,
    growth: float | None,
    residual_of_scaled: bool,
) -> Update:
    """``α P N + φ (G - P R)``, ``φ`` the ratio of norms of direction and coordinates, per channel.

    Chen et al. 2024, algorithm 1. With an orthonormal P the norm that is limited needs no residual:
    ``‖(G - P R)_j‖² = ‖G_j‖² - ‖R_j‖²``.

    Args:
        gradient: G.
        side: of the basis.
        coordinates: R.
        direction: Adam's direction N in the subspace.
        state: holds the norm of the last step.
        scale: α.
        growth: the limiter's γ; None leaves it out.
        residual_of_scaled: take the residual from ``G - α P R``, as the published code does.
    """
    dim = 0 if side == "left" else 1
    share = scale if residual_of_scaled else 1.0
    inner = coordinates.norm(dim=dim, keepdim=True)
    factor = direction.norm(dim=dim, keepdim=True) / (inner + TINY)
    outer, _ = squared_norms(gradient, dim)
    left_over = (outer - share * (2 - share) * inner.square()).clamp(min=0)
    squared = (left_over * factor.square()).sum()
    norm = (squared if side == "left" else gradient.rows.sum(squared)).sqrt()
    factor = factor / limited(norm, state, growth)
    return Update(scale * direction - share * factor * coordinates, factor)


def apollo(
    gradient: GradientMatrix,
    side: str,
    coordinates: Tensor,
    direction: Tensor,
    state: State,
    *,
    scale: float,
    growth: float | None,
    per_channel: bool,
    scale_first: bool,
) -> Update:
    """``sqrt(scale) φ ∘ G``: the gradient itself, scaled as Adam scales its projection (Zhu et al. 2025, algorithm 1).

    Args:
        gradient: G.
        side: of the basis.
        coordinates: R.
        direction: Adam's direction N for R.
        state: holds the norm of the last step.
        scale: its root multiplies the update.
        growth: the limiter's γ; None leaves it out.
        per_channel: one factor per channel (APOLLO), else one for the whole matrix (APOLLO-Mini).
        scale_first: multiply before the limiter looks.
    """
    dim = 0 if side == "left" else 1
    outer, _ = squared_norms(gradient, dim)
    if per_channel:
        factor = direction.norm(dim=dim, keepdim=True) / (coordinates.norm(dim=dim, keepdim=True) + TINY)
    else:
        sums = torch.stack([direction.square().sum(), coordinates.square().sum()])
        norms = (sums if side == "left" else gradient.rows.sum(sums)).sqrt()
        factor = norms[0] / (norms[1] + TINY)
    squared = (outer * factor.square()).sum()
    norm = (squared if side == "left" else gradient.rows.sum(squared)).sqrt()
    if scale_first:
        return Update(None, factor * scale**0.5 / limited(norm * scale**0.5, state, growth))
    return Update(None, factor / limited(norm, state, growth) * scale**0.5)


def channel_scales(squares: Tensor, count: int, state: State, beta2: float, eps: float) -> tuple[Tensor, Scalar]:
    """Scales that bring every channel of the projected side to unit size, and the scaled gradient's squared norm.

    ``a_i = 1 / (sqrt(q_i / c2) + eps)`` with ``q`` the running mean square of channel i: row i for a left basis, column
    i for a right one (one side of Adafactor's second moment, Shazeer and Stern 2018).

    Args:
        squares: squared norms of the channels, ``(rows here, 1)`` or ``(1, n)``, finite.
        count: numbers in a channel.
        state: ``channel_sq`` is updated.
        beta2: decay rate.
        eps: added to the root.
    """
    held = local(state["channel_sq"])
    return channel_scales_(squares, held, beta2=beta2, count=count, step=state["step"] + 1, eps=eps)


def normalized(
    scales: Tensor,
    outer: Scalar,
    inner: Scalar,
    damping: Scalar,
    coordinates: Tensor,
    direction: Tensor,
    state: State,
    *,
    gain: float,
    scale: float,
    growth: float | None,
) -> Update:
    """``α P N + f (G' - P R)`` for the normalised gradient ``G' = a ∘ G``: Isogrid's own rule.

    Channels of pure noise are brought to the size of the others, so that neither the subspace nor the residual is
    theirs. Inside the subspace the momentum averages noise away, which makes Adam's steps shorter; ``f`` is how much
    shorter, so that the residual, which has no momentum, is as cautious.

    Args:
        scales: a.
        outer: ``‖G'‖²``.
        inner: ``‖R‖²``.
        damping: f.
        coordinates: R of G'.
        direction: Adam's direction N over ``gain``; overwritten.
        state: holds the norm of the last step.
        gain: bias correction that the step size brings.
        scale: α.
        growth: the limiter's γ; None leaves it out.
    """
    factor = damping / gain
    if growth is not None:
        norm = torch.as_tensor(outer - inner, dtype=scales.dtype, device=scales.device).clamp(min=0).sqrt() * damping
        factor = factor / limited(norm, state, growth)
    kept = direction if scale == 1 else direction.mul_(scale)
    if isinstance(factor, Tensor):
        return Update(kept.addcmul_(coordinates, factor, value=-1), factor * scales)
    return Update(kept.add_(coordinates, alpha=-factor), factor * scales)


def squared_norms(gradient: GradientMatrix, dim: int) -> tuple[Tensor, Scalar]:
    """Squared norms of the columns (dim 0, whole on every rank) or of the rows here (dim 1), and the overall one."""
    squares, total = channel_squares(gradient.values, dim == 1)
    return gradient.rows.sum(squares) if dim == 0 else squares, gradient.rows.sum_number(total, squares)
