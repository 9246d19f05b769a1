"""Numbers on an even grid of few levels, and the rounding of a matrix to one: to the nearest level, or GPTQ's way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.fitting.sweep import Rounding

# Shrunken ranges that a search tries, as parts of the whole one, and the power of the error it goes by (GPTQ).
SHRINKS = tuple(1 - step / 100 for step in range(80))
SEARCH_POWER = 2.4


@dataclass(frozen=True)
class Grid:
    """``value = scale · (code - zero)``, codes and zeros whole numbers in 0 … 2^bits - 1.

    Attributes:
        scale: ``(rows, groups)``, positive.
        zero: ``(rows, groups)``.
        bits: of a code.
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, values: Tensor, group: slice | int) -> Tensor:
        """The nearest codes of ``values (rows, width)`` under the grids of one group."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        if isinstance(group, int):
            scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
        return (torch.round(values / scale) + zero).clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor, group: int) -> Tensor:
        """What codes of one group stand for."""
        return self.scale[:, group].unsqueeze(1) * (codes - self.zero[:, group].unsqueeze(1))


def grid_of(values: Tensor, bits: int, *, symmetric: bool, search: bool) -> tuple[Tensor, Tensor]:
    """``scale (rows,)`` and ``zero (rows,)`` of the grid that spans each row of ``values (rows, width)`` and zero.

    Args:
        values: numbers to be rounded.
        bits: of a code.
        symmetric: whether the range is as wide below zero as above.
        search: whether narrower ranges are tried for a smaller error, at the price of the largest numbers.
    """
    most = 2**bits - 1
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -1, low), torch.where(empty, 1, high)

    def spanned(part: float) -> tuple[Tensor, Tensor]:
        scale = (high - low) * part / most
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low * part / scale)
        return scale, zero

    best = spanned(1.0)
    if not search:
        return best

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        grid = Grid(scale.unsqueeze(1), zero.unsqueeze(1), bits)
        return (grid.values(grid.codes(values, 0), 0) - values).abs().pow(SEARCH_POWER).sum(1)

    least = error(*best)
    for part in SHRINKS[1:]:
        tried = spanned(part)
        reached = error(*tried)
        better = reached < least
        best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))  # type: ignore[assignment]
        least = torch.where(better, reached, least)
    return best


def grids_of(values: Tensor, group: int, bits: int, *, symmetric: bool, search: bool) -> Grid:
    """The grids of every run of ``group`` columns; the last run may be shorter."""
    found = [grid_of(part, bits, symmetric=symmetric, search=search) for part in values.split(group, dim=1)]
    scales, zeros = (torch.stack(pieces, dim=1) for pieces in zip(*found, strict=True))
    return Grid(scales, zeros, bits)


def nearest_codes(values: Tensor, grid: Grid, group: int) -> Tensor:
    """``(rows, n)``: every entry at its nearest level."""
    return torch.cat([grid.codes(part, g) for g, part in enumerate(values.split(group, dim=1))], dim=1)


class RoundToGrid(Rounding):
    """Columns rounded to grids: GPTQ's part of the sweep. Attributes ``codes (out, in)`` and ``grid`` are the result.

    Args:
        grid: of the original matrix.
        group_of: ``(in,)`` group of each column of the sweep.
        fresh: symmetric and search of grids found anew from the compensated columns when the sweep reaches a group;
            None keeps those given. Groups then have to be whole in a block.
    """

    def __init__(self, grid: Grid, group_of: Tensor, fresh: tuple[bool, bool] | None) -> None:
        self.grid, self.fresh = grid, fresh
        self.group_of = group_of.tolist()
        self.codes = torch.zeros(len(grid.scale), len(group_of), dtype=grid.scale.dtype, device=grid.scale.device)

    def column(self, j: int, rest: Tensor) -> Tensor:
        """The nearest level of each entry."""
        group = self.group_of[j]
        if self.fresh is not None and (j == 0 or self.group_of[j - 1] != group):
            width = self.group_of.count(group)
            symmetric, search = self.fresh
            scale, zero = grid_of(rest[:, :width], self.grid.bits, symmetric=symmetric, search=search)
            self.grid.scale[:, group], self.grid.zero[:, group] = scale, zero
        code = self.grid.codes(rest[:, :1], group)
        self.codes[:, j] = code[:, 0]
        return self.grid.values(code, group)[:, 0]
