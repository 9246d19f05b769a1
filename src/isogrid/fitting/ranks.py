"""How many directions a subspace has: a number, a share of the short side, or what the singular values say."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError


@dataclass(frozen=True)
class FixedRank:
    """``rank`` directions.

    Attributes:
        rank: at least 1.
        clip: take ``min(rank, rows, columns)`` where a matrix is smaller (the published methods do); False is an error
            there.
    """

    rank: int
    clip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise IsogridError(f"rank is {self.rank!r}; it is a whole number of directions, at least 1")

    def most(self, rows: int, columns: int) -> int:
        """The rank, known from the shape alone."""
        short = min(rows, columns)
        if self.rank > short and not self.clip:
            raise IsogridError(
                f"rank {self.rank} is beyond the {rows} x {columns} matrix; use at most {short}, "
                f"or FixedRank({self.rank}, clip=True) to take the short side there"
            )
        return min(self.rank, short)


@dataclass(frozen=True)
class FractionRank:
    """``max(1, floor(fraction · min(rows, columns)))`` directions (rSVDAdam's rule)."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise IsogridError(f"rank fraction is {self.fraction!r}; it lies in (0, 1]")

    def most(self, rows: int, columns: int) -> int:
        """The rank, known from the shape alone."""
        return max(1, math.floor(self.fraction * min(rows, columns)))


@dataclass(frozen=True)
class ThresholdRank:
    """Singular-value threshold: the directions with ``sigma_i >= threshold · sigma_1``, from 1 to ``limit`` of them."""

    threshold: float
    limit: int

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or self.limit < 1:
            raise IsogridError(
                f"threshold rank ({self.threshold!r}, limit {self.limit!r}): the threshold lies in (0, 1], "
                "the limit is at least 1"
            )

    def most(self, rows: int, columns: int) -> int:
        """The largest rank the rule may choose."""
        return min(self.limit, rows, columns)

    def choose(self, sigma: Tensor, energy: Tensor) -> int:
        """The rank for leading singular values ``sigma (most,)``, descending."""
        return max(1, int((sigma >= self.threshold * sigma[0]).sum()))


@dataclass(frozen=True)
class EnergyRank:
    """The fewest directions that hold a share ``energy`` of the squared Frobenius norm, from 1 to ``limit`` of them."""

    energy: float
    limit: int

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1 or self.limit < 1:
            raise IsogridError(
                f"energy rank ({self.energy!r}, limit {self.limit!r}): the energy lies in (0, 1], "
                "the limit is at least 1"
            )

    def most(self, rows: int, columns: int) -> int:
        """The largest rank the rule may choose."""
        return min(self.limit, rows, columns)

    def choose(self, sigma: Tensor, energy: Tensor) -> int:
        """The rank for leading singular values ``sigma (most,)`` of a matrix with squared norm ``energy``."""
        held = torch.cumsum(sigma.double().square(), 0)
        return min(len(sigma), 1 + int((held < self.energy * energy.double() * (1 - 1e-12)).sum()))


RankRule = FixedRank | FractionRank | ThresholdRank | EnergyRank
RULES: dict[str, type[RankRule]] = {
    "fixed": FixedRank,
    "fraction": FractionRank,
    "threshold": ThresholdRank,
    "energy": EnergyRank,
}


def as_rank_rule(rank: RankRule | int | float | dict[str, Any]) -> RankRule:
    """A rule from a rule, a whole number (`FixedRank`), a float (`FractionRank`), or what `spelled` wrote.

    Raises:
        IsogridError: none of these, or a value out of range.
    """
    if isinstance(rank, FixedRank | FractionRank | ThresholdRank | EnergyRank):
        return rank
    if isinstance(rank, dict) and rank.get("rule") in RULES:
        return RULES[rank["rule"]](**{key: value for key, value in rank.items() if key != "rule"})
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise IsogridError(f"rank is {rank!r}; give a whole number, a fraction such as 0.25, or a rule")
    return FixedRank(rank) if isinstance(rank, int) else FractionRank(rank)


def spelled(rule: RankRule) -> dict[str, Any]:
    """The rule as plain values, which a checkpoint may hold under ``weights_only`` loading."""
    name = next(name for name, cls in RULES.items() if isinstance(rule, cls))
    return {"rule": name, **asdict(rule)}
