"""The one solver that serves every format: it only multiplies.

From a given start, random ones, or both: alternating least squares where the matrix is affine in each factor alone,
then quasi-Newton descent on all factors together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isogrid.fitting.alternating import Multiply, alternating_least_squares
from isogrid.fitting.descent import descend
from isogrid.fitting.metric import Metric, squared_norm
from isogrid.fitting.report import OnStep

Factors = dict[str, Tensor]


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
        random_start: draws factors to begin with, of any size: they are scaled to the target's norm.
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
    for _ in range(max(restarts, 0 if starts else 1)):
        starts.append(_scaled(multiply, random_start(), weights, target, identity))
    if len(starts) > 1:
        trials = sorted((improved(begin, 10, None) for begin in starts), key=lambda trial: trial[0])
        starts = [found for _, found in trials[: -(-len(trials) // 4)]]
    return min((improved(begin, 1, on_step) for begin in starts), key=lambda trial: trial[0])[1]


def _scaled(multiply: Multiply, factors: Factors, weights: Sequence[str], target: Tensor, identity: Tensor) -> Factors:
    """All weights scaled alike until the matrix has the target's norm: descent then starts at the right size."""
    norm, wanted = multiply(factors, identity).norm(), target.norm()
    if weights and wanted == 0:
        return factors | {weights[-1]: torch.zeros_like(factors[weights[-1]])}
    if not weights or norm == 0:
        return factors
    scale = (wanted / norm) ** (1 / len(weights))
    return factors | {name: factors[name] * scale for name in weights}
