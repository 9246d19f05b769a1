"""Adam's moments in a subspace: how they are stored, updated, and carried into another basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isogrid.optim.codes import Place, decode, encode, takes_codes
from isogrid.optim.sharding import Share, local

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")
SIGNED = {"exp_avg": True, "exp_avg_sq": False, "error": True}


def _place(values: Tensor, share: Share | None) -> Place | None:
    if share is None or share.rows.group is None:
        return None
    width = values.shape[1:].numel()
    return Place(share.rows.start * width, share.rows.total * width, share.rows.largest)


def read(state: State, key: str, dtype: torch.dtype, share: Share | None = None) -> Tensor:
    """A stored tensor in the working dtype; the stored one itself where it has that dtype.

    Args:
        state: of one parameter.
        key: exp_avg, exp_avg_sq, error or a basis.
        dtype: the working dtype.
        share: of a state whose rows are the parameter's; None where it is whole on every rank.
    """
    values = local(state[key])
    if values.dtype == torch.uint8:
        return decode(values, local(state[f"{key}_scale"]), SIGNED[key], dtype, _place(values, share))
    return values if values.dtype == dtype else values.to(dtype)


def write(
    state: State,
    key: str,
    values: Tensor,
    precision: str,
    share: Share | None = None,
) -> None:
    """Store values in a precision; in place where a tensor of that shape and dtype is there.

    Args:
        state: of one parameter.
        key: exp_avg, exp_avg_sq or error.
        values: local values in the working dtype.
        precision: float32 (the working dtype), bfloat16 or 8bit.
        share: see `read`.
    """
    held = state.get(key)
    there = None if held is None else local(held)
    place = _place(values, share)
    if precision == "8bit" and takes_codes(values.numel() if place is None else place.total):
        codes, scale = encode(values, SIGNED[key], place)
        state[key], state[f"{key}_scale"] = codes if share is None else share.wrap(codes), scale
        return
    state.pop(f"{key}_scale", None)
    dtype = torch.bfloat16 if precision == "bfloat16" else values.dtype
    if there is not None and there.shape == values.shape and there.dtype == dtype:
        if there.data_ptr() != values.data_ptr():
            there.copy_(values)
        return
    stored = values.to(dtype)
    state[key] = stored if share is None else share.wrap(stored)


def adam_directions(
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float,
    style: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Update moments in place and return ``m / (sqrt(v) + e)``, and the denominators, few launches for many tensors.

    Tensors of one list may differ in shape.

    The bias corrections stand in the step size (`step_size`). With ``e = eps sqrt(c2)`` the step is torch's, with
    ``e = eps`` that of older Hugging Face code.

    Args:
        gradients: gradients or their coordinates.
        first: first moments m.
        second: second moments v.
        steps: 1-based steps of the moments.
        betas: decay rates.
        eps: added to the root.
        style: torch or hf.
    """
    beta1, beta2 = betas
    first, second, gradients = list(first), list(second), list(gradients)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    roots = torch._foreach_sqrt(second)
    torch._foreach_add_(roots, [eps_of(eps, step, betas, style) for step in steps])
    return list(torch._foreach_div(first, roots)), list(roots)


def eps_of(eps: float, step: int, betas: tuple[float, float], style: str) -> float:
    """What is added to the root of the uncorrected second moment."""
    return float(eps * (1 - betas[1] ** step) ** 0.5) if style == "torch" else eps


def step_size(lr: float, step: int, betas: tuple[float, float], correct_bias: bool) -> float:
    """``lr sqrt(c2) / c1``: what ``m / (sqrt(v) + e)`` is multiplied by; without correction ``lr``."""
    return float(lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)) if correct_bias else lr


def reproject(
    first: Tensor, second: Tensor, step: int, betas: tuple[float, float], left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Moments carried from an old basis into a new one.

    With ``C = P_newᵀ P_old``: ``m' = C m``; ``v' = c2 |(C∘C)(v/c2 - (m/c1)²) + (C m / c1)²|``, which treats the old
    coordinates as uncorrelated (LDAdam, Robert et al. 2025, algorithm 1). Free of the signs of either basis.

    Args:
        first: m, ``(r, n)``, ``(m, r)`` or ``(r, r)``.
        second: v, alike.
        step: completed steps of these moments, at least 1.
        betas: decay rates.
        left: C of the left basis, None where the rows are no coordinates.
        right: C of the right basis.
    """
    c1, c2 = 1 - betas[0] ** step, 1 - betas[1] ** step

    def turned(values: Tensor, power: int) -> Tensor:
        if left is not None:
            values = left**power @ values
        return values if right is None else values @ (right**power).mT

    moved = turned(first, 1)
    variance = turned(second / c2 - (first / c1).square(), 2)
    return moved, c2 * (variance + (moved / c1).square()).abs()
