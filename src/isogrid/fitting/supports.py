"""The best values of a matrix with few nonzeros, and the best places for them, group by group.

With everything else fixed, the best of all supports of a few neighbouring entries of a row is found by trying them:
each is a least-squares problem of a few unknowns whose matrix all rows share. A sweep does so for every group of every
row, and the weighted error never rises. It prunes a matrix, and the core between the wrappers of ARMOR.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.fitting.report import OnStep
from isogrid.fitting.sweep import kept_of

# Columns whose gradient is kept current; those of other blocks get the sum, one product a block.
BLOCK = 96
# More supports of a group than this are not all tried: entries then change places four at a time.
MOST_SUPPORTS = 128
SMALL_GROUP = 4
# Relative ridge of a group's equations: a wrapper may have made them singular.
RIDGE = 1e-12


@dataclass(frozen=True)
class Pattern:
    """Which supports are allowed: ``keep`` of every ``of`` aligned entries; ``keep=None``: any, as many as there are.

    Where a group has too many supports to try, or any are allowed, a sweep takes the columns of a row four at a time in
    a random order, within groups or across the row, and leaves the number of nonzeros of each four as it is.
    """

    keep: int | None
    of: int

    @property
    def tried_whole(self) -> bool:
        """Whether all supports of a group are tried at once."""
        return self.keep is not None and len(_combinations(self.of, self.keep)) <= MOST_SUPPORTS


def sweep_supports(
    values: Tensor,
    mask: Tensor,
    wish: Tensor,
    moment: Tensor,
    pattern: Pattern,
    *,
    whole: float,
    sweeps: int,
    tolerance: float,
    generator: torch.Generator,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower ``whole - 2 tr(wish Vᵀ) + tr(V M Vᵀ)`` over the values and the support of V, float64.

    With ``wish = T M`` and ``whole = tr(T M Tᵀ)`` that is the weighted error of V against T.

    Args:
        values: ``(out, in)``, zero outside the mask.
        mask: ``(out, in)`` booleans that obey the pattern.
        wish: ``(out, in)``.
        moment: ``(in, in)`` positive semidefinite.
        pattern: which supports are allowed.
        whole: the error of a matrix of zeros.
        sweeps: most sweeps over all groups.
        tolerance: stop when a sweep lowers the error by less than this part.
        generator: of random orders, where the pattern needs them.
        on_step: called with (sweep, error); 0 is the start.

    Returns:
        ``values`` and ``mask``, new tensors; the error is at most that of the start.
    """
    values, mask = values.clone(), mask.clone()
    gradient = wish - values @ moment
    error = whole - float(((wish + gradient) * values).sum())
    if on_step is not None:
        on_step(0, error)
    groups = Groups(moment, pattern) if pattern.tried_whole else None
    for sweep in range(1, sweeps + 1):
        before = error
        if groups is not None:
            groups.improve(values, mask, gradient)
        else:
            order = random_order(values.shape[1], pattern, generator).to(values.device)
            mixed = [piece[:, order] for piece in (values, mask, gradient)]
            Groups(moment[order][:, order], Pattern(None, SMALL_GROUP)).improve(*mixed)
            for piece, moved in zip((values, mask, gradient), mixed, strict=True):
                piece[:, order] = moved
        gradient = wish - values @ moment  # free of the drift of the running gradient
        error = whole - float(((wish + gradient) * values).sum())
        if on_step is not None:
            on_step(sweep, error)
        if before - error <= tolerance * before:
            break
    return values, mask


class Groups:
    """The groups of columns under one metric, with the equations of all their supports solved.

    Args:
        moment: ``(n, n)`` positive semidefinite.
        pattern: with few enough supports; ``keep=None`` tries all supports of the size that is there.
        price: of an entry; where it is given, ``keep=None`` tries supports of all sizes.
    """

    def __init__(self, moment: Tensor, pattern: Pattern, price: float | None = None) -> None:
        n, of = len(moment), pattern.of
        self.moment, self.price = moment, price
        self.counted = pattern.keep is None and price is None
        whole = n // of * of
        self.width = of * max(1, BLOCK // of)
        self.solved: list[tuple[int, int, Tensor, Tensor]] = []  # first column, last, supports, inverses
        for first, last, size in ((0, whole, of), (whole, n, n - whole)):
            if first == last:
                continue
            sizes = range(size + 1) if pattern.keep is None else (kept_of(size, pattern.keep, of),)
            supports = torch.cat([supports_of(size, count) for count in sizes]).to(moment.device)
            diagonal_blocks = moment[first:last, first:last].reshape(-1, size, (last - first) // size, size)
            diagonal_blocks = diagonal_blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, size, size)
            inverses = solved_supports(diagonal_blocks, supports)
            self.solved += [
                (first + g * size, first + (g + 1) * size, supports, inverses[g]) for g in range(len(inverses))
            ]

    def improve(self, values: Tensor, mask: Tensor, gradient: Tensor) -> None:
        """One sweep, in place; ``gradient`` is ``(T - V) M`` and stays so, all ``(rows, n)``."""
        n = len(self.moment)
        pending = list(reversed(self.solved))
        rows = torch.arange(len(values), device=values.device)
        for first in range(0, n, self.width):
            last = min(first + self.width, n)
            near = gradient[:, first:last].contiguous()
            start = values[:, first:last].clone()
            while pending and pending[-1][0] < last:
                a, b, supports, inverses = pending.pop()
                old = values[:, a:b]
                wish = torch.addmm(near[:, a - first : b - first], old, self.moment[a:b, a:b])
                found = (wish @ inverses).view(len(values), len(supports), b - a)
                gain = torch.bmm(found, wish.unsqueeze(-1)).squeeze(-1)  # (rows, supports)
                if self.counted:
                    gain.masked_fill_(supports.sum(1) != mask[:, a:b].sum(1, keepdim=True), -torch.inf)
                if self.price is not None:
                    gain -= self.price * supports.sum(1)
                best = gain.argmax(1)
                new = found[rows, best]
                near.addmm_(new - old, self.moment[a:b, first:last], alpha=-1)
                values[:, a:b], mask[:, a:b] = new, supports[best]
            change = values[:, first:last] - start
            gradient -= change @ self.moment[first:last]


def solved_supports(blocks: Tensor, supports: Tensor) -> Tensor:
    """``(groups, size, supports · size)``: a row times it is the least-squares solution on each support.

    Args:
        blocks: ``(groups, size, size)`` of the metric.
        supports: ``(supports, size)`` booleans.
    """
    groups, size, _ = blocks.shape
    diagonal = blocks.diagonal(dim1=-2, dim2=-1)
    floor = (RIDGE * diagonal.mean(-1, keepdim=True)).clamp(min=torch.finfo(blocks.dtype).tiny)
    ridged = blocks + torch.diag_embed(RIDGE * diagonal + floor)
    both = (supports.unsqueeze(2) & supports.unsqueeze(1)).to(blocks.dtype)  # (supports, size, size)
    outside = torch.diag_embed((~supports).to(blocks.dtype))
    scale = ridged.diagonal(dim1=-2, dim2=-1).mean(-1).view(groups, 1, 1, 1)
    inverse = torch.linalg.inv(ridged.unsqueeze(1) * both + outside * scale) * both
    return inverse.permute(0, 2, 1, 3).reshape(groups, size, len(supports) * size)


def _combinations(size: int, count: int) -> Sequence[tuple[int, ...]]:
    """All choices of ``count`` places of ``size``, or the first few where they are very many."""
    return list(itertools.islice(itertools.combinations(range(size), count), MOST_SUPPORTS + 1))


def supports_of(size: int, count: int) -> Tensor:
    """``(choose(size, count), size)`` booleans."""
    chosen = list(itertools.combinations(range(size), count))
    mask = torch.zeros(len(chosen), size, dtype=torch.bool)
    for row, places in enumerate(chosen):
        mask[row, list(places)] = True
    return mask


def random_order(n: int, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """An order of the columns in which every four, as far as they go, lie in one group, or anywhere."""
    if pattern.keep is None:
        return torch.randperm(n, generator=generator, device=generator.device)
    groups = [range(first, min(first + pattern.of, n)) for first in range(0, n, pattern.of)]
    # Fours never straddle two groups: what a group leaves over waits for the next sweep.
    return torch.cat(
        [
            (torch.randperm(len(group), generator=generator, device=generator.device) + group[0])[
                : len(group) // SMALL_GROUP * SMALL_GROUP
            ]
            for group in groups
        ]
    )
