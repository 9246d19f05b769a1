"""Damped Gauss-Newton steps for many starts at once: least squares with a full Jacobian, on small problems.

Under a metric the factors of a product span many scales, and quasi-Newton descent needs thousands of steps in their
narrow valleys. Here every step solves ``(Jᵀ J + λ I) step = Jᵀ residual`` (Levenberg 1944, Marquardt 1963) with the
damping λ of Nielsen (1999), which is a few tens of steps to the bottom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of one batch of Jacobians: more at once are no faster, they leave the processor's cache.
BATCH_NUMBERS = 2**19
# A start rests when ten steps together lower its objective by less than this fraction.
RESTING = 1e-7


@dataclass(frozen=True)
class Points:
    """Where the descents from several starts stand, in rows.

    Attributes:
        parameters: ``(starts, parameters)`` float64.
        objective: ``(starts,)`` squared norm of the residual.
        damping: ``(starts,)`` λ, relative to the mean diagonal of ``Jᵀ J``.
        growth: ``(starts,)`` what the damping is multiplied with when a step fails.
    """

    parameters: Tensor
    objective: Tensor
    damping: Tensor
    growth: Tensor

    @classmethod
    def begin(cls, parameters: Tensor, residual: Callable[[Tensor], Tensor]) -> Points:
        """Before the first step."""
        objective = residual(parameters).square().sum(1)
        return cls(parameters, objective, torch.full_like(objective, 1e-2), torch.full_like(objective, 2.0))

    def __getitem__(self, rows: Tensor | slice) -> Points:
        return Points(self.parameters[rows], self.objective[rows], self.damping[rows], self.growth[rows])

    def best(self, count: int) -> Points:
        """So many of lowest objective."""
        return self[self.objective.argsort()[:count]]

    @classmethod
    def joined(cls, parts: list[Points]) -> Points:
        """The rows of several, in order."""
        return cls(
            torch.cat([part.parameters for part in parts]),
            torch.cat([part.objective for part in parts]),
            torch.cat([part.damping for part in parts]),
            torch.cat([part.growth for part in parts]),
        )


def levenberg_marquardt(
    points: Points,
    residual: Callable[[Tensor], Tensor],
    jacobian: Callable[[Tensor], Tensor],
    *,
    steps: int,
    on_step: Callable[[int, Points], None] | None = None,
) -> Points:
    """Lower the squared norm of the residual from every start; none of them ever rises.

    Args:
        points: where the descents stand.
        residual: ``(starts, parameters) -> (starts, residuals)``.
        jacobian: ``(starts, parameters) -> (starts, residuals, parameters)``.
        steps: most steps; a start that has come to rest takes no more.
        on_step: called with the step and the points after it.
    """
    starts, parameters = points.parameters.shape
    size = max(1, BATCH_NUMBERS // max(parameters * residual(points.parameters[:1]).shape[1], 1))
    if starts > size and on_step is None:
        parts = [
            levenberg_marquardt(points[begin : begin + size], residual, jacobian, steps=steps)
            for begin in range(0, starts, size)
        ]
        return Points.joined(parts)
    moving = torch.arange(starts, device=points.parameters.device)
    ten_ago = points.objective
    for step in range(1, steps + 1):
        there = _step(points[moving], residual, jacobian)
        points = Points(
            *(
                old.index_copy(0, moving, new)
                for old, new in (
                    (points.parameters, there.parameters),
                    (points.objective, there.objective),
                    (points.damping, there.damping),
                    (points.growth, there.growth),
                )
            )
        )
        if on_step is not None:
            on_step(step, points)
        if step % 10 == 0:
            moving = ((ten_ago - points.objective) > RESTING * ten_ago).nonzero()[:, 0]
            ten_ago = points.objective
            if not len(moving):
                break
    return points


def _step(points: Points, residual: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor]) -> Points:
    """One step from every start, kept where it lowers the objective."""
    here, value = residual(points.parameters), points.objective
    slopes = jacobian(points.parameters)
    gram = slopes.mT @ slopes
    gradient = (here.unsqueeze(1) @ slopes)[:, 0]
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(gram.dtype).tiny)
    ridge = (points.damping * scale)[:, None].expand(-1, gram.shape[1])
    root, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge))
    move = -torch.cholesky_solve(gradient.unsqueeze(2), root)[:, :, 0]
    # What the quadratic model says the step gains.
    expected = ((ridge * move - gradient) * move).sum(1)
    parameters = points.parameters + move
    objective = residual(parameters).square().sum(1)
    lower = (objective < value) & (failed == 0)
    ratio = ((value - objective) / expected.clamp(min=torch.finfo(gram.dtype).tiny)).nan_to_num(0.0, 1.0, 0.0)
    eased = points.damping * (1 - (2 * ratio - 1) ** 3).clamp(min=1 / 3, max=2.0)
    return Points(
        torch.where(lower[:, None], parameters, points.parameters),
        torch.where(lower, objective, value),
        torch.where(lower, eased, points.damping * points.growth).clamp(1e-14, 1e14),
        torch.where(lower, torch.full_like(points.growth, 2.0), points.growth * 2).clamp(max=1e14),
    )
