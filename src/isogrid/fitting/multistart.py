"""The global minimum of small problems, as far as many starts find it.

Random starts come in waves. Of each wave every start takes a few Levenberg-Marquardt steps, the better half some more
and the best eighth goes on to rest (successive halving). It ends when the best minimum was reached from three starts,
the fit is exact, or the waves are used up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isogrid.fitting.alternating import Multiply
from isogrid.fitting.levenberg_marquardt import Points, levenberg_marquardt
from isogrid.fitting.metric import Metric
from isogrid.fitting.report import OnStep

Factors = dict[str, Tensor]
Rows = Callable[[Tensor], Tensor]
# Starts of a wave, and most waves.
WAVE, WAVES = 32, 5
# Steps of every start of a wave, then of the better half, then, until they rest, of the best eighth.
STEPS = (20, 20, 100)
# The best minimum counts as reached again by a start that rests so near above it; after three it is believed.
SAME, BELIEVED = 1e-3, 3
# An objective below this part of the target's is zero to rounding: nothing is left to find.
EXACT = 1e-24
# Most multiply-adds, and fewer starts than this are not worth it.
WORK, FEWEST = 2**35, 8


def affordable_starts(residuals: int, parameters: int) -> int:
    """How many starts a problem of this size gets: 160, fewer where a step is dear, 0 where only a few would do."""
    starts = min(WAVE * WAVES, WORK // max(sum(STEPS[:2]) * residuals * parameters**2, 1))
    return starts if starts >= FEWEST else 0


def fit_multistart(
    multiply: Multiply,
    random_start: Callable[[], Factors],
    trainable: Sequence[str],
    target: Tensor,
    metric: Metric | None,
    *,
    start: Factors | None,
    starts: int,
    on_step: OnStep | None = None,
) -> Factors:
    """Minimise the weighted error from many starts by least squares with full Jacobians, float64.

    Args:
        multiply: ``(factors, rows (rows, in)) -> (rows, out)``, affine in each trainable factor alone.
        random_start: draws factors to begin with.
        trainable: names of the factors to move; the others are those of ``start``, or of the first random start.
        target: ``(out, in)`` float64.
        metric: metric of the inputs, or None.
        start: factors to improve, or None.
        starts: most random starts, at least one.
        on_step: called with (step, objective) while the best is led to its rest; step 0 is where that begins.

    Returns:
        The best factors met; their objective is at most that of ``start``.
    """
    samples = torch.eye(target.shape[1], dtype=target.dtype, device=target.device) if metric is None else metric.root.mT
    wish = samples @ target.mT
    whole = float(wish.square().sum())
    first = random_start() if start is None else start
    trainable = [name for name in trainable if first[name].numel()]
    like = {name: first[name] for name in trainable}
    sizes = [value.numel() for value in like.values()]

    def flat(factors: Factors) -> Tensor:
        return torch.cat([factors[name].reshape(-1) for name in trainable])

    def shaped(parameters: Tensor) -> Factors:
        parts = parameters.split(sizes)
        return first | {name: part.view(like[name].shape) for name, part in zip(trainable, parts, strict=True)}

    def residual(parameters: Tensor) -> Tensor:
        return (multiply(shaped(parameters), samples) - wish).reshape(-1)

    def jacobian(parameters: Tensor) -> Tensor:
        """One product per unit vector: the product is affine in each factor, so its differences are exact."""
        factors = shaped(parameters)
        columns = []
        for name, size in zip(trainable, sizes, strict=True):

            def product(value: Tensor, name: str = name) -> Tensor:
                return multiply(factors | {name: value}, samples).reshape(-1)

            units = torch.eye(size, dtype=target.dtype, device=target.device).view(size, *like[name].shape)
            columns.append(over(product)(units) - product(torch.zeros_like(like[name])))
        return torch.cat(columns).mT

    over = _batching(residual, flat(first))
    residuals, jacobians = over(residual), over(jacobian)

    def advanced(points: Points, steps: int) -> Points:
        return levenberg_marquardt(points, residuals, jacobians, steps=steps)

    rested: list[Points] = []
    begun = [flat(first)]
    for wave in range(0, starts, WAVE):
        begun += [flat(random_start()) for _ in range(min(WAVE, starts - wave))]
        points = advanced(Points.begin(torch.stack(begun), residuals), STEPS[0])
        points = advanced(points.best(-(-len(begun) // 2)), STEPS[1])
        rested.append(advanced(points.best(-(-len(begun) // 8)), STEPS[2]))
        objectives = torch.cat([points.objective for points in rested])
        least = float(objectives.min())
        if least <= EXACT * whole or int((objectives <= least * (1 + SAME)).sum()) >= BELIEVED:
            break
        begun = []
    best = Points.joined(rested).best(1)
    if on_step is not None:
        on_step(0, float(best.objective))
    tell = None if on_step is None else lambda step, points: on_step(step, float(points.objective))
    best = levenberg_marquardt(best, residuals, jacobians, steps=STEPS[2], on_step=tell)
    return shaped(best.parameters[0])


def _batching(function: Rows, example: Tensor) -> Callable[[Rows], Rows]:
    """What makes of a function of one row one of many: vmap, or one after the other where it can't follow."""
    try:
        torch.vmap(function)(example.unsqueeze(0))
    except RuntimeError:  # a branch on numbers, or an operation in place
        return lambda one: lambda rows: torch.stack([one(row) for row in rows])
    return torch.vmap
