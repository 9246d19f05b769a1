"""The one solver that serves every format: it only multiplies.

From a given start, random ones, or both: alternating least squares where the matrix is affine in each factor alone,
then quasi-Newton descent on all factors together. Small problems affine in each factor are searched from many starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isogrid.fitting.alternating import Multiply, alternating_least_squares
from isogrid.fitting.descent import descend
from isogrid.fitting.metric import Metric, squared_norm
from isogrid.fitting.multistart import affordable_starts, fit_multistart
from isogrid.fitting.report import OnStep

Factors = dict[str, Tensor]
# A matrix of so few entries is tried from many starts; where least squares is too dear for them, from 20.
SMALL, SMALL_RESTARTS = 2048, 20


def fit_thoroughly(
    multiply: Multiply,
    random_start: Callable[[], Factors],
    trainable: Sequence[str],
    weights: Sequence[str],
    target: Tensor,
    metric: Metric | None,
    *,
    start: Factors,
    affine: bool,
    on_step: OnStep | None = None,
) -> Factors:
    """Improve ``start`` with all that a few seconds buy: many starts on small problems, one long descent on large ones.

    Args: those of `fit_general`, and whether the matrix is ``affine`` in each trainable factor alone.

    Returns:
        The best factors met; their objective is at most that of ``start``.
    """
    small = target.numel() <= SMALL
    parameters = sum(start[name].numel() for name in trainable)
    starts = affordable_starts(target.numel(), parameters) if small and affine and parameters else 0
    if starts:
        draw = _scaled_starts(multiply, random_start, trainable, weights, target, start)
        return fit_multistart(multiply, draw, trainable, target, metric, start=start, starts=starts, on_step=on_step)
    return fit_general(
        multiply, random_start, trainable, weights, target, metric, start=start,
        restarts=SMALL_RESTARTS if small else 0, rounds=10 if affine else 0, steps=200, on_step=on_step,
    )  # fmt: skip


def fit_general(
    multiply: Multiply,
    random_start: Callable[[], Factors],
    trainable: Sequence[str],
    weights: Sequence[str],
    target: Tensor,
    metric: Metric | None,
    *,
    start: Factors | None,
    restarts: int,
    rounds: int,
    steps: int,
    on_step: OnStep | None = None,
) -> Factors:
    """Minimise the weighted error over the trainable factors from several starts, float64.

    A tenth of the work is spent on each of several starts, all of it on the best quarter; the best is kept.

    Args:
        multiply: ``(factors, rows (rows, in)) -> (rows, out)``.
        random_start: draws factors to begin with, of any size: they are scaled to the target's norm, and what is not
            trained is taken from ``start``.
        trainable: names of the factors to move, in the order in which least squares visits them.
        weights: names of those that scale the matrix.
        target: ``(out, in)`` float64.
        metric: metric of the inputs, or None.
        start: factors to improve, or None.
        restarts: random starts beside it; without a start there is at least one.
        rounds: most rounds of alternating least squares; 0 where the matrix is not affine in each factor.
        steps: most steps of quasi-Newton descent.
        on_step: called by the descents that go on to the end, with (iteration, objective).

    Returns:
        The best factors met; their objective is at most that of ``start``.
    """
    identity = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)

    def improved(found: Factors, share: int, tell: OnStep | None) -> tuple[float, Factors]:
        if rounds:
            most = min(rounds, max(rounds // share, 2))
            found = alternating_least_squares(multiply, found, trainable, target, metric, rounds=most)
        if steps:
            most = min(steps, max(steps // share, 20))
            found = descend(multiply, found, set(trainable), target, metric, steps=most, on_step=tell)
        return squared_norm(target - multiply(found, identity).mT, metric), found

    starts = [] if start is None else [start]
    draw = _scaled_starts(multiply, random_start, trainable, weights, target, start)
    starts += [draw() for _ in range(max(restarts, 0 if starts else 1))]
    if len(starts) > 1:
        trials = sorted((improved(begin, 10, None) for begin in starts), key=lambda trial: trial[0])
        starts = [found for _, found in trials[: -(-len(trials) // 4)]]
    return min((improved(begin, 1, on_step) for begin in starts), key=lambda trial: trial[0])[1]


def _scaled_starts(
    multiply: Multiply,
    random_start: Callable[[], Factors],
    trainable: Sequence[str],
    weights: Sequence[str],
    target: Tensor,
    start: Factors | None,
) -> Callable[[], Factors]:
    """Draws factors, all weights scaled alike until the matrix has the target's norm: a good size to descend from."""
    identity = torch.eye(target.shape[1], dtype=target.dtype, device=target.device)
    kept = {name: value for name, value in (start or {}).items() if name not in trainable}

    def draw() -> Factors:
        factors = random_start() | kept
        norm, wanted = multiply(factors, identity).norm(), target.norm()
        if weights and wanted == 0:
            return factors | {weights[-1]: torch.zeros_like(factors[weights[-1]])}
        if not weights or norm == 0:
            return factors
        scale = (wanted / norm) ** (1 / len(weights))
        return factors | {name: factors[name] * scale for name in weights}

    return draw
