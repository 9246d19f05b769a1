"""Which entries of a matrix to keep, and with which values: what the sparse formats are fitted by.

The rules of the literature, and exact sweeps that start where the best of them ends. Every rule keeps exactly as many
entries as it is told; ties go to the earlier entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric
from isogrid.fitting.report import OnStep
from isogrid.fitting.supports import SMALL_GROUP, Groups, Pattern, random_order, sweep_supports
from isogrid.fitting.sweep import (
    BLOCK,
    KeepGroups,
    KeepMask,
    KeepShare,
    damped_moment,
    inverse_root,
    largest,
    largest_of_groups,
    sweep_columns,
)

PRUNERS = ("magnitude", "wanda", "sparsegpt", "nowag")
# Added to norms that are divided by (NoWag).
NORM_FLOOR = 1e-5
# Most steps of a refit, and the part of a row's squared residual at which it rests.
REFIT_STEPS, REFIT_RESOLUTION = 20, 1e-22


@dataclass(frozen=True)
class Kept:
    """How many entries are kept and where they may lie: ``keep`` of every ``of`` in a row, or ``count`` anywhere."""

    count: int | None = None
    keep: int | None = None
    of: int = 1

    def choose(self, scores: Tensor) -> Tensor:
        """Mask of the entries of largest score, over the whole matrix where they may lie anywhere."""
        if self.keep is not None:
            return largest_of_groups(scores, self.keep, self.of)
        assert self.count is not None
        return largest(scores, self.count)

    def choose_in_rows(self, scores: Tensor) -> Tensor:
        """As `choose`, but every row keeps an equal number of entries; of equal ones the later, as Wanda sorts."""
        if self.keep is not None:
            return largest_of_groups(scores, self.keep, self.of)
        assert self.count is not None
        rows, n = scores.shape
        even, more = divmod(self.count, rows)
        order = scores.sort(dim=1, stable=True).indices.flip(1)
        # What is left over after equal numbers goes to the first rows.
        counts = even + (torch.arange(rows, device=scores.device) < more).long()
        ranked = torch.arange(n, device=scores.device) < counts.unsqueeze(1)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, ranked)


def pruned(target: Tensor, metric: Metric | None, kept: Kept, method: str, damping: float) -> tuple[Tensor, Tensor]:
    """A method of the literature.

    Args:
        target: ``(out, in)`` float64.
        metric: of the inputs; None is the identity.
        kept: how many entries where.
        method: "magnitude": the largest (Han et al. 2015). "wanda": the largest ``|w_ij| · (E x_j²)^½``, row by row
            (Sun et al. 2024). "nowag": the largest ``w̄_ij² · E x_j²`` of the matrix with its columns, then its rows,
            divided by their norms (NoWag-P, Liu et al. 2025). "sparsegpt": `sweep_columns` (Frantar and Alistarh 2023).
        damping: of "sparsegpt", share of the mean diagonal.

    Returns:
        ``values (out, in)``, zero outside of ``mask (out, in)``.
    """
    n = target.shape[1]
    power = torch.ones(n, dtype=target.dtype, device=target.device) if metric is None else metric.moment.diagonal()
    if method == "sparsegpt":
        hessian, dead = damped_moment(metric, n, damping, target)
        root = inverse_root(hessian)
        current = target.masked_fill(dead, 0)
        if kept.keep is not None:
            width = kept.of * max(1, BLOCK // kept.of)
            groups = KeepGroups(target.shape, root, kept.keep, kept.of)
            return sweep_columns(current, root, groups, block=width)[0], groups.mask
        assert kept.count is not None
        share = KeepShare(target.shape, root, kept.count)
        return sweep_columns(current, root, share)[0], share.mask
    if method == "magnitude":
        mask = kept.choose(target.abs())
    elif method == "wanda":
        mask = kept.choose_in_rows(target.abs() * power.sqrt())
    else:
        mask = kept.choose(power * normalized(target)[0].square())
    return target * mask, mask


def normalized(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NoWag's normalisation: ``W = diag(rows) · W̄ · diag(columns)``; returns ``W̄``, ``rows (out,)``, ``columns (in,)``.

    Columns first, then the rows of what that leaves, by their Euclidean norms.
    """
    # Relative to the matrix's own size, so that a matrix of small numbers is no other case.
    size = float(target.norm()) or 1.0
    columns = target.norm(dim=0) + NORM_FLOOR * size
    scaled = target / columns
    rows = scaled.norm(dim=1) + NORM_FLOOR
    return scaled / rows.unsqueeze(1), rows, columns


def prune(
    target: Tensor,
    metric: Metric | None,
    kept: Kept,
    *,
    start: tuple[Tensor, Tensor] | None,
    damping: float,
    sweeps: int,
    tolerance: float,
    generator: torch.Generator,
    on_step: OnStep | None,
) -> tuple[Tensor, Tensor]:
    """The best values and places that exact sweeps find: from SparseGPT's, or from ``start``.

    Without a metric the largest entries, which are optimal. Arguments and result are those of `pruned`; ``sweeps``,
    ``tolerance`` and ``on_step`` those of `sweep_supports`.
    """
    largest_entries = kept.choose(target.abs())
    # A matrix that is as sparse already is its own best fit under any metric.
    if metric is None or not target[~largest_entries].any():
        return target * largest_entries, largest_entries
    moment = metric.matrix
    if kept.keep is not None:
        values, mask = pruned(target, metric, kept, "sparsegpt", damping) if start is None else start
        pattern = Pattern(kept.keep, kept.of)
    else:
        if start is None:
            # What leaving an entry out costs when the rest of its row makes up for it (LeCun et al. 1990).
            mask = kept.choose(target.abs() / torch.cholesky_inverse(metric.root).diagonal().sqrt())
            root = inverse_root(moment)
            start = sweep_columns(target, root, KeepMask(mask))[0], mask
        values, mask = exchange(target, moment, *start, sweeps=sweeps, generator=generator)
        pattern = Pattern(None, SMALL_GROUP)
    wish = target @ moment
    values, mask = sweep_supports(
        values,
        mask,
        wish,
        moment,
        pattern,
        whole=float((wish * target).sum()),
        sweeps=sweeps,
        tolerance=tolerance,
        generator=generator,
        on_step=on_step,
    )
    return refitted(target, moment, mask, values), mask


def exchange(
    target: Tensor, moment: Tensor, values: Tensor, mask: Tensor, *, sweeps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Let the rows of a matrix exchange entries: a sweep at a price, after which as many entries are kept as before.

    Every four entries of a row take the support that gains most after paying for each entry; the price is what the last
    entry kept is worth alone. Goes on while the error falls; returns ``values, mask`` that are no worse.
    """
    count = int(mask.sum())
    if count in (0, mask.numel()):
        return values, mask
    worth = _worth_alone(moment)
    gradient = (target - values) @ moment
    error = float(((target - values) * gradient).sum())
    for _ in range(sweeps):
        price = float(worth(values, gradient).flatten().kthvalue(mask.numel() - count + 1).values)
        order = random_order(values.shape[1], Pattern(None, SMALL_GROUP), generator).to(values.device)
        mixed = [piece[:, order] for piece in (values, mask, gradient)]
        Groups(moment[order][:, order], Pattern(None, SMALL_GROUP), price).improve(*mixed)
        tried = torch.empty_like(values)
        tried[:, order] = mixed[0]
        chosen = largest(worth(tried, (target - tried) @ moment), count)
        tried = refitted(target, moment, chosen, tried * chosen, steps=10)
        gradient_there = (target - tried) @ moment
        reached = float(((target - tried) * gradient_there).sum())
        if reached >= error * (1 - 1e-3):
            if reached < error:
                values, mask = tried, chosen
            break
        values, mask, gradient, error = tried, chosen, gradient_there, reached
    return values, mask


def _worth_alone(moment: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What each entry lowers the error by when it alone is set to its best value, all others as they are."""
    diagonal = moment.diagonal()
    return lambda values, gradient: (gradient + values * diagonal).square() / diagonal


def refitted(target: Tensor, moment: Tensor, mask: Tensor, values: Tensor, *, steps: int = REFIT_STEPS) -> Tensor:
    """The best values at given places, from near ones: conjugate gradients on all rows at once.

    Each row is the least-squares problem ``V[i, s] M[s, s] = (T M)[i, s]`` (fitting theory 3.4).

    Args:
        target: ``(out, in)`` float64.
        moment: ``(in, in)`` positive definite.
        mask: ``(out, in)`` booleans.
        values: ``(out, in)``, zero outside the mask.
        steps: most steps, each one product with the moment.
    """
    scale = 1 / moment.diagonal()
    wish = (target @ moment) * mask
    smallest = REFIT_RESOLUTION * (wish.square() * scale).sum(1, keepdim=True)
    residual = wish - (values @ moment) * mask
    direction = residual * scale
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        if not (slope > smallest).any():
            break
        moved = (direction @ moment) * mask
        curvature = (direction * moved).sum(1, keepdim=True)
        length = torch.where(curvature > 0, slope / curvature, 0)
        values = values + length * direction
        residual = residual - length * moved
        preconditioned = residual * scale
        new_slope = (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + torch.where(slope > 0, new_slope / slope, 0) * direction
        slope = new_slope
    return values
