"""Products of formats: one matrix after another, each in its own format."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric, rank_bound
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import too_small
from isogrid.formats.factors import Factor, Factors, prefixed, unprefixed
from isogrid.formats.monarch import Monarch
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits


@dataclass(frozen=True)
class Product(Format):
    """``W = parts[-1] · … · parts[0]``: the first part acts on the input, the last one gives the output.

    Holds what no single format does: a circulant matrix is two permuted Monarchs, the transform and its way back. No
    closed form fits a product of formats: it is fitted by the general solver from random starts, where parts that are
    `Permuted` keep their natural order.

    Attributes:
        parts: the formats, at least one.
        widths: features between the parts, one number fewer than parts; None: min(out, in) between all.
    """

    parts: tuple[Format, ...] = (Monarch(), Monarch())
    widths: tuple[int, ...] | None = None

    name: ClassVar[str] = "product"

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple | list) or not self.parts:
            raise IsogridError(f"product: parts are one or more formats, got {self.parts!r}")
        if not all(isinstance(part, Format) for part in self.parts):
            raise IsogridError(f"product: parts are one or more formats, got {self.parts!r}")
        object.__setattr__(self, "parts", tuple(self.parts))
        # A product is linear in each factor where all its parts are: then the general solver can alternate.
        linear = all(part.traits.linear_in_factors for part in self.parts)
        object.__setattr__(self, "traits", Traits(linear_in_factors=linear))
        if self.widths is None:
            return
        if not isinstance(self.widths, tuple | list) or not all(
            isinstance(width, int) and not isinstance(width, bool) and width >= 1 for width in self.widths
        ):
            raise IsogridError(f"product: widths are positive integers, got {self.widths!r}")
        if len(self.widths) != len(self.parts) - 1:
            raise IsogridError(
                f"product: {len(self.parts)} parts have {len(self.parts) - 1} widths between them, got {self.widths!r}"
            )
        object.__setattr__(self, "widths", tuple(self.widths))

    def shapes(self, out_features: int, in_features: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of each part."""
        between = self.widths
        if between is None:
            between = (min(out_features, in_features),) * (len(self.parts) - 1)
        return [(rows, columns) for columns, rows in itertools.pairwise((in_features, *between, out_features))]

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """Those of the parts, as ``part0_…``, ``part1_…``."""
        out: dict[str, Factor] = {}
        for i, (part, shape) in enumerate(zip(self.parts, self.shapes(out_features, in_features), strict=True)):
            out |= prefixed(f"part{i}_", part.factors(*shape))
        return out

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """The parts' products, one after another."""
        for i, (part, (rows, _)) in enumerate(zip(self.parts, self.shapes(out_features, x.shape[-1]), strict=True)):
            x = part.multiply(unprefixed(f"part{i}_", factors), x, rows)
        return x

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The parts' matrices, multiplied."""
        shapes = self.shapes(out_features, in_features)
        matrix = self.parts[0].dense(unprefixed("part0_", factors), *shapes[0])
        for i, (part, shape) in enumerate(zip(self.parts[1:], shapes[1:], strict=True), 1):
            matrix = part.dense(unprefixed(f"part{i}_", factors), *shape) @ matrix
        return matrix

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """Those of the parts, in the order they act."""
        return [
            dataclasses.replace(stage, factor=f"part{i}_{stage.factor}")
            for i, (part, shape) in enumerate(zip(self.parts, self.shapes(out_features, in_features), strict=True))
            for stage in part.components(*shape)
        ]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """The parts' costs, added."""
        shapes = self.shapes(out_features, in_features)
        costs = [part.cost(*shape, dtype) for part, shape in zip(self.parts, shapes, strict=True)]
        return sum(costs[1:], costs[0])

    def deploy(
        self, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, dict[str, Tensor]]:
        """The product of the parts' inference forms."""
        parts: list[Format] = []
        out: Factors = {}
        for i, (part, shape) in enumerate(zip(self.parts, self.shapes(out_features, in_features), strict=True)):
            form, own = part.deploy(unprefixed(f"part{i}_", factors), *shape)
            parts.append(form)
            out |= prefixed(f"part{i}_", own)
        return type(self)(tuple(parts), self.widths), out

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Each part as it starts alone; their gains multiply."""
        for i, (part, shape) in enumerate(zip(self.parts, self.shapes(out_features, in_features), strict=True)):
            part.initialize(unprefixed(f"part{i}_", factors), *shape, generator)

    def orthonormalize(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        """Each part as it does it alone."""
        for i, (part, shape) in enumerate(zip(self.parts, self.shapes(out_features, in_features), strict=True)):
            part.orthonormalize(unprefixed(f"part{i}_", factors), *shape)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """Every part its smallest member and a share of the rest, by the entries of its matrix.

        What a part leaves is added to the share of the next, and a last pass spends the rest.
        """
        shapes = self.shapes(out_features, in_features)

        def amount(part: Format, shape: tuple[int, int]) -> int:
            return budget.amount(part.cost(*shape, budget.dtype))

        parts = [_smallest(part, shape, budget) for part, shape in zip(self.parts, shapes, strict=True)]
        least = [amount(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        left = budget.limit - sum(least)
        if left < 0:
            cost = dataclasses.replace(self, parts=tuple(parts)).cost(out_features, in_features, budget.dtype)
            raise too_small(self, out_features, in_features, budget, cost)
        entries = [rows * columns for rows, columns in shapes]
        for i, (part, shape) in enumerate(zip(self.parts, shapes, strict=True)):
            share = left * entries[i] // sum(entries[i:])
            parts[i] = _grown(part, parts[i], shape, budget.with_limit(least[i] + share))
            left -= amount(parts[i], shape) - least[i]
        for i, (part, shape) in enumerate(zip(self.parts, shapes, strict=True)):
            available = left + amount(parts[i], shape)
            parts[i] = _grown(part, parts[i], shape, budget.with_limit(available))
            left = available - amount(parts[i], shape)
        return dataclasses.replace(self, parts=tuple(parts))

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """The matrix has the rank of the narrowest place at most; None where that is none of its own sides."""
        narrowest = min(self.widths or target.shape)
        return rank_bound(target, narrowest, metric) if narrowest < min(target.shape) else None


def _grown(part: Format, member: Format, shape: tuple[int, int], budget: Budget) -> Format:
    """The largest member of a part within a budget; the known one where the part would have left room to grow into.

    A sum, say, shares a budget equally: its smallest member may cost less than the least budget it can share out.
    """
    try:
        return part.sized(*shape, budget)
    except BudgetError:
        return member


def _smallest(part: Format, shape: tuple[int, int], budget: Budget) -> Format:
    """The cheapest member of a part, in the budget's unit: found by bisection, since formats only say what fits."""
    high = 1
    while True:
        try:
            found = part.sized(*shape, budget.with_limit(high))
            break
        except BudgetError:
            if high > 2**62:
                raise
            high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        try:
            found = part.sized(*shape, budget.with_limit(middle))
            high = middle
        except BudgetError:
            low = middle + 1
    return found
