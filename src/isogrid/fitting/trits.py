"""Groups of numbers as sums of scaled ternary vectors: ``w ≈ a₁ t₁ + … + a_K t_K``, t in {-1, 0, 1} (PTQTP, Xiao et al.
2025).

Levels are symmetric about zero, so only magnitudes matter: with those of a group sorted once, and their running sums,
one step of the alternation «nearest level, least squares» takes a few binary searches, whatever the size of the group.
That makes many starts affordable, and the published start is a poor one: both planes begin equal, so that the first
least squares is singular.

Groups are rows ``(N, G)``. Zeros change nothing, so that short groups are filled up with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

MOST_PLANES = 3
# Starts of the alternation: ratios of the smaller scales to the first, and what the scales sum to, in standard
# deviations; None is the largest magnitude.
RATIOS: dict[int, tuple[tuple[float, ...], ...]] = {
    2: tuple((ratio,) for ratio in (0.12, 0.2, 0.27, 1 / 3, 0.4, 0.47, 0.55, 0.6, 0.66, 0.73, 0.8, 0.87, 0.94)),
    3: ((0.7, 0.4), (0.6, 0.3), (0.5, 0.25), (0.7, 0.5), (0.55, 0.4), (1 / 3, 1 / 9), (0.8, 0.5), (0.45, 0.2),
        (0.65, 0.45)),
}  # fmt: skip
TOTALS: dict[int, tuple[float | None, ...]] = {2: (None, 1.9, 2.3, 2.7), 3: (None, 2.7, 3.0)}
# Every start gets two steps, the best so many go on until they stand.
TRIAL_STEPS, FINALISTS, MOST_STEPS = 2, 5, 60
STANDS = 1e-8
# A normal matrix with less than this share of its diagonal's determinant says nothing about how to share a sum out.
SINGULAR = 1e-9
# Numbers of a tensor of queries: it stays in the cache.
QUERIES = 2**18
# The order in which the published loop looks at pairs decides ties, and with them how its equal planes part.
LEXICOGRAPHIC = tuple((one, two) for one in (-1, 0, 1) for two in (-1, 0, 1))
SPARSE_FIRST = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
FIRST_RIDGE, LAST_RIDGE, WORST_CONDITION = 1e-8, 1.0, 1e6
PUBLISHED_STEPS, PUBLISHED_CHANGE = 50, 1e-4


@cache
def _codes(planes: int) -> Tensor:
    """``(levels, planes)``: one code of each pair ±, fewest nonzeros first, among these the earlier planes first."""
    every = [code for code in itertools.product((1, 0, -1), repeat=planes) if next((t for t in code if t), 1) > 0]
    every.sort(key=lambda code: (sum(map(abs, code)), [-abs(t) for t in code], [-t for t in code]))
    return torch.tensor(every, dtype=torch.float64)


def ordered(scales: Tensor) -> Tensor:
    """Scales ``(..., K)`` in their canonical form: not negative, falling."""
    return scales.abs().sort(-1, descending=True).values


def levels(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The magnitudes that scales ``(N, K)`` can write, rising, and the trits that write them.

    Returns:
        ``sizes (N, L)`` and ``trits (N, L, K)`` int8, L = (3^K + 1) / 2. Where several codes mean one magnitude, all
        of its places hold the one with the fewest nonzeros, the earlier planes first.
    """
    codes = _codes(scales.shape[-1]).to(scales)
    values = scales @ codes.mT
    sizes, order = values.abs().sort(dim=-1, stable=True)
    for place in range(1, sizes.shape[-1]):  # equal magnitudes take the code of the first of them
        same = sizes[:, place] == sizes[:, place - 1]
        order[:, place] = torch.where(same, order[:, place - 1], order[:, place])
    sign = torch.where(values < 0, -1.0, 1.0).to(values).gather(-1, order)
    return sizes, (codes[order] * sign.unsqueeze(-1)).to(torch.int8)


def nearest(groups: Tensor, scales: Tensor) -> Tensor:
    """The best trits ``(N, G, K)`` int8 for given scales ``(N, K)``: the level nearest to each number, ties inwards."""
    sizes, trits = levels(scales)
    between = (sizes[:, 1:] + sizes[:, :-1]) / 2
    place = torch.searchsorted(between, groups.abs().contiguous())  # (N, G)
    found = trits.gather(1, place.unsqueeze(-1).expand(-1, -1, trits.shape[-1]))
    return found * groups.sign().to(torch.int8).unsqueeze(-1)


def best_scales(groups: Tensor, trits: Tensor, weights: Tensor | None = None, *, ridge: float = FIRST_RIDGE) -> Tensor:
    """The best scales ``(N, K)`` for given trits, by least squares with positive ``weights (N, G)`` of the numbers."""
    planes = trits.to(groups)
    heavy = planes if weights is None else planes * weights.unsqueeze(-1)
    gram = heavy.mT @ planes
    right = (heavy.mT @ groups.unsqueeze(-1)).squeeze(-1)
    mean = 1.0 if weights is None else weights.mean(-1)[:, None, None]
    return _solved(gram + ridge * mean * torch.eye(gram.shape[-1]).to(gram), right)[0]


def split(groups: Tensor, planes: int, weights: Tensor | None = None, *, published: bool = False) -> Tensor:
    """Scales ``(N, K)``, canonical, of the best sum of ``planes`` ternary vectors found for every group.

    One plane: the global optimum without weights. More: from many starts the alternation of exact steps, the best
    kept.

    Args:
        groups: ``(N, G)``.
        planes: 1 to 3.
        weights: ``(N, G)``, or ``(1, G)`` for all groups, not negative: what the square of an error costs.
        published: also try where the published loop ends (two planes), so that no group ends worse.
    """
    if planes == 1 and weights is None:
        return _one_plane(groups)
    found = groups.new_zeros(len(groups), planes)
    starts = len(RATIOS.get(planes, ((),))) * len(TOTALS.get(planes, TOTALS[2]))
    size = max(QUERIES // (starts * len(_codes(planes))), 1)
    for first in range(0, len(groups), size):
        part = slice(first, first + size)
        own = weights if weights is None or len(weights) == 1 else weights[part]
        extra = None
        if published and planes == 2:
            extra = ordered(published_scales(groups[part])).unsqueeze(1)
        found[part] = _alternated(groups[part], planes, own, extra)
    return found


def _one_plane(groups: Tensor) -> Tensor:
    """The optimum: keeping the k largest leaves the energy less (their sum)² / k; k is tried throughout."""
    sums = groups.abs().sort(-1, descending=True).values.cumsum(-1)
    counts = torch.arange(1, groups.shape[-1] + 1, dtype=groups.dtype, device=groups.device)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    return sums.gather(-1, best) / (best + 1)


class _Sorted:
    """Groups by rising magnitude with their running sums: all that a step of the alternation needs."""

    def __init__(self, groups: Tensor, weights: Tensor | None) -> None:
        self.sizes, order = groups.abs().contiguous().sort(-1)
        mass = None if weights is None else weights.expand_as(groups).gather(-1, order)
        carried = self.sizes if mass is None else mass * self.sizes
        self.sums = torch.nn.functional.pad(carried.cumsum(-1), (1, 0))
        self.mass = None if mass is None else torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
        self.energy = (carried * self.sizes).sum(-1, keepdim=True)

    def of(self, chosen: Tensor) -> _Sorted:
        """Only these groups."""
        part = object.__new__(_Sorted)
        part.sizes, part.sums, part.energy = self.sizes[chosen], self.sums[chosen], self.energy[chosen]
        part.mass = None if self.mass is None else self.mass[chosen]
        return part

    def step(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest levels, then least squares: from scales ``(N, S, K)``, canonical, to such scales.

        Returns also the squared error ``(N, S)`` of the new scales with the trits of the old ones.
        """
        count, starts, planes = scales.shape
        codes = _codes(planes).to(scales)
        sizes, order, sign = _places(scales, codes)
        between = ((sizes[..., 1:] + sizes[..., :-1]) / 2).flatten(1)
        place = torch.searchsorted(self.sizes, between, right=True)  # at a tie the lower level
        ends = self.sizes.shape[-1]
        mass = place.to(scales) if self.mass is None else self.mass.gather(1, place)
        whole = torch.full_like(scales[:, :1, 0], ends) if self.mass is None else self.mass[:, -1:]
        counts = _between(mass.view(count, starts, -1), whole)
        sums = _between(self.sums.gather(1, place).view(count, starts, -1), self.sums[:, -1:])
        # From levels in order of size to codes, whose products then are one constant matrix.
        by_code = torch.zeros_like(sizes)
        counts = by_code.scatter(-1, order[..., 1:], counts)
        sums = by_code.scatter(-1, order[..., 1:], sums if sign is None else sums * sign[..., 1:])
        gram = (counts @ (codes.unsqueeze(-1) * codes.unsqueeze(-2)).flatten(1)).view(count, starts, planes, planes)
        right = sums @ codes
        solved, good = _solved(gram, right)
        new = torch.where(good.unsqueeze(-1), solved, scales)
        error = self.energy + ((gram @ new.unsqueeze(-1)).squeeze(-1) - 2 * right).mul(new).sum(-1)
        return ordered(new), error


def _places(scales: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Magnitudes of the levels ``(N, S, L)``, rising, their codes, and their signs (None: none is negative)."""
    if scales.shape[-1] == 2:  # without sorting: 0, then the smaller scale and the difference, the larger, the sum
        one, two = scales.unbind(-1)
        apart = one - two
        sizes = torch.stack(
            [torch.zeros_like(one), torch.minimum(two, apart), torch.maximum(two, apart), one, one + two], -1
        )
        inner = (two > apart).long()
        zero = torch.zeros_like(inner)
        return sizes, torch.stack([zero, 2 + 2 * inner, 4 - 2 * inner, zero + 1, zero + 3], -1), None
    values = scales @ codes.mT
    sizes, order = values.abs().sort(dim=-1, stable=True)
    return sizes, order, torch.where(values < 0, -1.0, 1.0).to(values).gather(-1, order)


def _between(running: Tensor, whole: Tensor) -> Tensor:
    """From sums below each bound, and of all, to sums between bounds; below the first bound lies level zero."""
    ends = torch.cat([running[..., 1:], whole.unsqueeze(1).expand(-1, running.shape[1], 1)], -1)
    return ends - running


def _solved(gram: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions of normal equations ``(..., K, K)`` of at most three unknowns, and which of them are to be trusted."""
    planes = gram.shape[-1]
    matrix = [[gram[..., i, j] for j in range(planes)] for i in range(planes)]
    vector = [right[..., i] for i in range(planes)]
    good = torch.ones_like(vector[0], dtype=torch.bool)
    for i in range(planes):  # elimination without exchange: the matrices are positive semidefinite
        pivot = matrix[i][i]
        good &= pivot > SINGULAR * gram[..., i, i]
        pivot = torch.where(pivot > 0, pivot, torch.ones_like(pivot))
        for k in range(i + 1, planes):
            share = matrix[k][i] / pivot
            for j in range(i + 1, planes):
                matrix[k][j] = matrix[k][j] - share * matrix[i][j]
            vector[k] = vector[k] - share * vector[i]
        vector[i] = vector[i] / pivot
        for j in range(i + 1, planes):
            matrix[i][j] = matrix[i][j] / pivot
    for i in reversed(range(planes)):
        for j in range(i + 1, planes):
            vector[i] = vector[i] - matrix[i][j] * vector[j]
    return torch.stack(vector, -1), good


def _starts(groups: Tensor, planes: int) -> Tensor:
    """``(N, S, K)``: every ratio with every total."""
    largest = groups.abs().amax(-1)
    # Zeros that fill a group up are no numbers of it.
    deviation = (groups.square().sum(-1) / (groups != 0).sum(-1).clamp(min=1)).sqrt()
    if planes == 1:
        return torch.stack([total * deviation for total in (0.8, 1.2, 1.6)] + [largest], -1).unsqueeze(-1)
    shape = torch.tensor([(1.0, *ratios) for ratios in RATIOS[planes]]).to(groups)
    shape = shape / shape.sum(-1, keepdim=True)
    totals = torch.stack([largest if one is None else one * deviation for one in TOTALS[planes]], -1)
    return (totals[:, :, None, None] * shape).flatten(1, 2)


def _alternated(groups: Tensor, planes: int, weights: Tensor | None, extra: Tensor | None) -> Tensor:
    """`split` of one piece: the best end of the alternation from all starts."""
    data = _Sorted(groups, weights)
    scales = _starts(groups, planes)
    if extra is not None:
        scales = torch.cat([scales, extra], 1)
    for _ in range(TRIAL_STEPS):
        scales, error = data.step(scales)
    keep = error.topk(min(FINALISTS, error.shape[1]), dim=1, largest=False).indices
    if extra is not None:  # whatever it promised after two steps
        keep = torch.cat([keep, torch.full_like(keep[:, :1], scales.shape[1] - 1)], 1)
    scales = scales.gather(1, keep.unsqueeze(-1).expand(-1, -1, planes))
    error = error.gather(1, keep)
    moving = torch.arange(len(groups), device=groups.device)
    for _ in range(MOST_STEPS):
        now, reached = data.step(scales[moving])
        change = (now - scales[moving]).abs().amax(-1) > STANDS * now.amax(-1)
        scales[moving], error[moving] = now, reached
        still = change.any(-1)
        if not still.any():
            break
        if 2 * int(still.sum()) < len(moving):  # what stands is left behind
            data, moving = data.of(still), moving[still]
    best = error.argmin(-1)
    return scales[torch.arange(len(groups), device=groups.device), best]


def published_scales(
    groups: Tensor,
    *,
    candidates: Sequence[tuple[int, int]] = LEXICOGRAPHIC,
    steps: int = PUBLISHED_STEPS,
    tell: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Scales ``(N, 2)`` by the published loop: both planes begin as the signs; ridge regression and search in turn.

    The ridge grows tenfold until the normal matrix is conditioned better than 1e6, beginning anew at each step. A group
    stops when no scale changes by more than 1e-4 of its root mean square (the paper: of one, which would stop small
    weights at once), or after 50 steps. The last search is followed by one more regression.

    Args:
        groups: ``(N, G)`` float64.
        candidates: pairs of trits in the order of preference at ties.
        steps: most.
        tell: called after each step with the scales and trits of all groups.
    """
    signs = torch.where(groups >= 0, 1.0, -1.0).to(groups)
    planes = torch.stack([signs, signs], -1)
    scales = groups.new_ones(len(groups), 2)
    allowed = PUBLISHED_CHANGE * groups.square().mean(-1).sqrt()
    moving = torch.arange(len(groups), device=groups.device)
    for _ in range(steps):
        some, own = groups[moving], planes[moving]
        now = _ridge_regression(some, own)
        change = (now - scales[moving]).abs().amax(-1)
        scales[moving], planes[moving] = now, _searched(some, now, candidates)
        if tell is not None:
            tell(scales, planes)
        moving = moving[change >= allowed[moving]]
        if not len(moving):
            break
    return best_scales(groups, planes)


def _ridge_regression(groups: Tensor, planes: Tensor) -> Tensor:
    one, two = planes.unbind(-1)
    first, second, both = one.square().sum(-1), two.square().sum(-1), (one * two).sum(-1)
    right, other = (one * groups).sum(-1), (two * groups).sum(-1)
    ridge = torch.full_like(first, FIRST_RIDGE)
    while True:
        a, b = first + ridge, second + ridge
        determinant = a * b - both.square()
        condition = (a.square() + b.square() + 2 * both.square()) / determinant.abs()
        worse = ((condition > WORST_CONDITION) | condition.isnan()) & (ridge < LAST_RIDGE)
        if not worse.any():
            return torch.stack([b * right - both * other, a * other - both * right], -1) / determinant.unsqueeze(-1)
        ridge = torch.where(worse, ridge * 10, ridge)


def _searched(groups: Tensor, scales: Tensor, candidates: Sequence[tuple[int, int]]) -> Tensor:
    """The best pair of every number, the first of equals."""
    least = torch.full_like(groups, float("inf"))
    one, two = torch.zeros_like(groups), torch.zeros_like(groups)
    for first, second in candidates:
        error = (groups - (first * scales[:, :1] + second * scales[:, 1:])).square()
        better = error < least
        least = torch.where(better, error, least)
        one, two = one.masked_fill(better, first), two.masked_fill(better, second)
    return torch.stack([one, two], -1)
