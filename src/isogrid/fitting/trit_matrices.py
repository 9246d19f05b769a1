"""Matrices in trit planes under a metric: error feedback from column to column, then trits and scales in turn.

The error of a matrix under a metric is ``tr((W - V) M (W - V)ᵀ)``. Error feedback (`sweep`) fits the scales of a group
of columns when it gets there, to the columns as they are compensated by then. With the trits it found, the best scales
of a whole row are one least squares; with scales, a trit at a time can be made the best. Neither raises the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric, cholesky
from isogrid.fitting.sweep import Rounding, inverse_root, sweep_columns
from isogrid.fitting.trits import levels, nearest, ordered, published_scales, split

# Numbers of the largest tensor that a refit of some rows takes.
REFIT_NUMBERS = 2**25
RIDGE = 1e-10


def in_groups(matrix: Tensor, group: int) -> Tensor:
    """``(rows, columns)`` to ``(rows, groups, group)``, the last group filled up with zeros."""
    missing = -matrix.shape[1] % group
    # What nothing is added to stays a view, and a transposed one has no axes to merge.
    return torch.nn.functional.pad(matrix, (0, missing)).contiguous().view(len(matrix), -1, group)


def written(trits: Tensor, scales: Tensor, group: int) -> Tensor:
    """The matrix ``(rows, columns)`` of trits ``(rows, columns, K)`` and scales ``(rows, groups, K)``."""
    wide = scales.repeat_interleave(group, 1)[:, : trits.shape[1]]
    return (trits * wide).sum(-1)


def stored_as(scales: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Scales rounded to what they are stored in."""
    return scales if dtype is None else scales.to(dtype).to(scales.dtype)


def split_matrix(
    target: Tensor,
    planes: int,
    group: int,
    weights: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    published: bool = False,
) -> tuple[Tensor, Tensor]:
    """Every group of a matrix on its own: trits ``(rows, columns, K)`` int8 and scales ``(rows, groups, K)``.

    Args:
        target: ``(rows, columns)`` float64.
        planes: 1 to 3.
        group: columns that share scales.
        weights: ``(columns,)``: what the square of an error costs; None: the same everywhere.
        dtype: what scales are stored in; trits are the best for scales rounded to it.
        published: no group worse than where the published loop ends.
    """
    rows, columns = target.shape
    grouped = in_groups(target, group)
    count = grouped.shape[1]
    if weights is None:
        scales = split(grouped.view(-1, group), planes, published=published).view(rows, count, planes)
    else:
        scales = torch.empty(rows, count, planes, dtype=target.dtype, device=target.device)
        for q, own in enumerate(in_groups(weights.unsqueeze(0), group)[0]):
            scales[:, q] = split(grouped[:, q], planes, own.unsqueeze(0), published=published)
    scales = stored_as(scales, dtype)
    trits = nearest(grouped.view(-1, group), scales.view(-1, planes))
    return trits.view(rows, -1, planes)[:, :columns], scales


def split_as_published(target: Tensor, group: int, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Two planes by the published loop; a short last group by itself, since its signs begin on real numbers only."""
    rows, columns = target.shape
    whole = columns // group * group
    parts = [published_scales(target[:, :whole].reshape(-1, group)).view(rows, -1, 2)]
    if whole < columns:
        parts.append(published_scales(target[:, whole:]).view(rows, 1, 2))
    scales = stored_as(ordered(torch.cat(parts, 1)), dtype)
    trits = nearest(in_groups(target, group).view(-1, group), scales.view(-1, 2))
    return trits.view(rows, -1, 2)[:, :columns], scales


class TritRounding(Rounding):
    """Columns take the nearest of the levels that their group's scales write; scales are fitted when a group begins.

    Attributes ``trits (rows, columns, K)`` and ``scales (rows, groups, K)`` are the choice.
    """

    def __init__(self, shape: torch.Size, weights: Tensor, planes: int, group: int, dtype: torch.dtype | None) -> None:
        rows, columns = shape
        self.weights, self.planes, self.group, self.dtype = weights, planes, group, dtype
        self.trits = torch.zeros(rows, columns, planes, dtype=torch.int8, device=weights.device)
        self.scales = torch.zeros(rows, -(-columns // group), planes, dtype=weights.dtype, device=weights.device)

    def column(self, j: int, rest: Tensor) -> Tensor:
        """Fits the group that begins; then each number of the column takes its level."""
        q = j // self.group
        if j % self.group == 0:
            own = rest[:, : self.group].contiguous()
            weights = self.weights[j : j + self.group].unsqueeze(0)
            self.scales[:, q] = stored_as(split(own, self.planes, weights), self.dtype)
            self.levels = Levels(self.scales[:, q])
        value, self.trits[:, j] = self.levels.nearest(rest[:, 0])
        return value


class Levels:
    """The levels of one group of every row."""

    def __init__(self, scales: Tensor) -> None:
        self.sizes, self.trits = levels(scales)
        self.between = (self.sizes[:, 1:] + self.sizes[:, :-1]) / 2

    def nearest(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """The levels ``(rows,)`` nearest to a column, and their trits ``(rows, K)``."""
        place = torch.searchsorted(self.between, column.abs().unsqueeze(1))
        sign = column.sign()
        value = self.sizes.gather(1, place)[:, 0] * sign
        trits = self.trits.gather(1, place.unsqueeze(-1).expand(-1, -1, self.trits.shape[-1]))[:, 0]
        return value, trits * sign.to(torch.int8).unsqueeze(1)


def feed_back(
    target: Tensor, metric: Metric, planes: int, group: int, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Columns rounded from left to right, their errors made up for by those behind; arguments as in `split_matrix`."""
    moment = metric.matrix
    rounding = TritRounding(target.shape, moment.diagonal(), planes, group, dtype)
    sweep_columns(target, inverse_root(moment), rounding, block=min(group, target.shape[1]))
    return rounding.trits, rounding.scales


def refit_scales(target: Tensor, trits: Tensor, scales: Tensor, group: int, moment: Tensor) -> Tensor:
    """The best scales of all groups of a row together, for its trits; a row that gains nothing keeps its own."""
    rows, groups, planes = scales.shape
    width = groups * group
    wide = torch.nn.functional.pad(moment, (0, width - len(moment), 0, width - len(moment)))
    grouped = torch.nn.functional.pad(trits, (0, 0, 0, width - len(moment))).view(rows, groups, group, planes)
    blocks = wide.view(width, groups, group).transpose(0, 1)  # (groups, width, group)
    wish = in_groups(target @ moment, group)
    found = scales.clone()
    for part in torch.arange(rows, device=target.device).split(max(REFIT_NUMBERS // (width * groups * planes), 1)):
        own = grouped[part].to(target)  # (r, q, j, k)
        count = len(part)
        stacked = own.permute(1, 2, 0, 3).reshape(groups, group, -1)  # (q, j, r k)
        seen = (blocks @ stacked).view(groups, groups, group, count, planes)  # (q', q, j, r, k)
        gram = own.permute(1, 0, 3, 2).unsqueeze(0) @ seen.permute(0, 1, 3, 2, 4)  # (q', q, r, k, k')
        gram = gram.permute(2, 1, 3, 0, 4).reshape(count, groups * planes, -1)
        right = (own.mT @ wish[part].unsqueeze(-1)).view(count, -1)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        # A group without a nonzero trit in a plane: its scale says nothing, and stays.
        ridge = torch.where(diagonal > 0, RIDGE * diagonal, diagonal.mean(-1, keepdim=True).clamp(min=1e-300))
        root = cholesky(gram + torch.diag_embed(ridge))
        before = scales[part].view(count, -1)
        change = torch.cholesky_solve((right - (gram @ before.unsqueeze(-1))[..., 0]).unsqueeze(-1), root)[..., 0]
        after = torch.where(diagonal > 0, before + change, before)

        def error(own: Tensor, gram: Tensor = gram, right: Tensor = right) -> Tensor:
            return ((gram @ own.unsqueeze(-1))[..., 0] - 2 * right).mul(own).sum(-1)

        better = error(after) < error(before)
        found[part] = torch.where(better.unsqueeze(-1), after, before).view(count, groups, planes)
    return found


def improve_trits(
    target: Tensor, trits: Tensor, scales: Tensor, group: int, moment: Tensor, *, block: int = 128
) -> Tensor:
    """Every trit once, from left to right, made the best for all others as they are; scales canonical."""
    trits = trits.clone()
    matrix = written(trits, scales, group)
    gradient = (target - matrix) @ moment
    columns = target.shape[1]
    table = None
    for first in range(0, columns, block):
        last = min(first + block, columns)
        own, moved = gradient[:, first:last].clone(), torch.zeros_like(gradient[:, first:last])
        for j in range(first, last):
            if table is None or j % group == 0:
                table = Levels(scales[:, j // group])
            wish = matrix[:, j] + own[:, j - first] / moment[j, j]
            value, trits[:, j] = table.nearest(wish)
            change = value - matrix[:, j]
            moved[:, j - first] = change
            own.addr_(change, moment[j, first:last], alpha=-1)
        gradient -= moved @ moment[first:last]
    return trits


def canonical(trits: Tensor, scales: Tensor, group: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The same matrix with scales not negative and falling, rounded, and of equal codes the one of fewest nonzeros."""
    scales = stored_as(scales, dtype)
    values = in_groups(written(trits, scales, group), group)
    again = ordered(scales)
    columns, planes = trits.shape[1], trits.shape[2]
    found = nearest(values.reshape(-1, group), again.reshape(-1, planes)).view(len(trits), -1, planes)
    return found[:, :columns], again


def fit_under(
    target: Tensor,
    metric: Metric,
    planes: int,
    group: int,
    *,
    sweeps: int = 2,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Error feedback, then ``sweeps`` times all scales of a row and all trits in turn, the best for the others."""
    moment = metric.matrix
    trits, scales = feed_back(target, metric, planes, group, dtype=dtype)
    for _ in range(sweeps):
        better = canonical(trits, refit_scales(target, trits, scales, group, moment), group, dtype)
        trits, scales = _better(target, (trits, scales), better, group, metric)
        trits = improve_trits(target, trits, scales, group, moment)
    return trits, scales


def _better(
    target: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], group: int, metric: Metric
) -> tuple[Tensor, Tensor]:
    """Row by row the better of two, since rounding scales may undo what their refit gained."""
    errors = [target - written(*held, group) for held in (one, other)]
    costs = [((error @ metric.matrix) * error).sum(1) for error in errors]
    better = (costs[1] < costs[0])[:, None, None]
    return torch.where(better, other[0], one[0]), torch.where(better, other[1], one[1])
