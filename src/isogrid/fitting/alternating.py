"""Alternating least squares for any format whose matrix is affine in each factor alone.

With all factors but one fixed, the weighted error is a quadratic function of that one. Conjugate gradients on the
virtual samples (fitting theory 4.1, 4.6) lower it without ever forming the quadratic: one product and one
vector-Jacobian product per step. Warm-started and run in turn over the factors, the objective never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric
from isogrid.fitting.report import OnStep

Multiply = Callable[[dict[str, Tensor], Tensor], Tensor]


@torch.inference_mode(False)  # a caller's inference mode would record no gradients
@torch.no_grad()
def alternating_least_squares(
    multiply: Multiply,
    start: dict[str, Tensor],
    trainable: Sequence[str],
    target: Tensor,
    metric: Metric | None,
    *,
    rounds: int = 10,
    inner: int = 10,
    tolerance: float = 1e-4,
    on_step: OnStep | None = None,
) -> dict[str, Tensor]:
    """Minimise the weighted error over the trainable factors in turn, float64.

    Args:
        multiply: ``(factors, rows (rows, in)) -> (rows, out)``, affine in each trainable factor alone.
        start: factors to begin with.
        trainable: names of the factors to move, in the order they are visited.
        target: ``(out, in)`` float64.
        metric: metric of the inputs, or None.
        rounds: most rounds over all factors.
        inner: conjugate-gradient steps on one factor.
        tolerance: stop when a round lowers the objective by less than this fraction.
        on_step: called with (round, objective); round 0 is the start.

    Returns:
        Factors whose objective is at most the start's.
    """
    samples = (
        torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
        if metric is None
        else metric.root.mT.clone()
    )
    wish = samples @ target.mT
    factors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in start.items()}
    objective = float((wish - multiply(factors, samples)).square().sum())
    if on_step is not None:
        on_step(0, objective)
    for step in range(1, rounds + 1):
        before = objective
        for name in trainable:
            objective = _improve(multiply, factors, name, samples, wish, inner)
        if on_step is not None:
            on_step(step, objective)
        if before - objective <= tolerance * before:
            break
    return factors


def _improve(
    multiply: Multiply, factors: dict[str, Tensor], name: str, samples: Tensor, wish: Tensor, inner: int
) -> float:
    """Conjugate gradients on one factor, in place of the dict's entry; returns the objective."""
    value = factors[name]

    def product(of: Tensor) -> Tensor:
        return multiply(factors | {name: of}, samples)

    with torch.enable_grad():
        leaf = value.clone().requires_grad_()
        output = product(leaf)

    def adjoint(rows: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output, leaf, rows, retain_graph=True)
        return gradient

    constant = product(torch.zeros_like(value))
    residual = wish - output.detach()
    first = float(residual.square().sum())
    gradient = adjoint(residual)
    direction = gradient
    slope = float(gradient.square().sum())
    smallest = 1e-28 * max(slope, float(wish.square().sum()) * 1e-12)
    for _ in range(inner):
        if slope <= smallest:
            break
        moved = product(direction) - constant
        curvature = float(moved.square().sum())
        if curvature <= 0:
            break
        length = slope / curvature
        value = value + length * direction
        residual = residual - length * moved
        gradient = adjoint(residual)
        new_slope = float(gradient.square().sum())
        direction = gradient + (new_slope / slope) * direction
        slope = new_slope
    exact = float((wish - product(value)).square().sum())  # free of the drift of the running residual
    if exact > first:
        return first
    factors[name] = value
    return exact
