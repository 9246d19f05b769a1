"""Sums of formats: low rank plus something local, say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, squared_norm
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors, prefixed, unprefixed
from isogrid.formats.low_rank import LowRank
from isogrid.formats.monarch import Monarch
from isogrid.formats.start import Component


@dataclass(frozen=True)
class Sum(Format):
    """``W = Σ terms``: each term in its own format, one product each, results added.

    Attributes:
        terms: the formats, at least one. A budget is shared equally among them; what one leaves goes to the next.
    """

    terms: tuple[Format, ...] = (LowRank(), Monarch())

    name: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        if not self.terms or not all(isinstance(term, Format) for term in self.terms):
            raise IsogridError(f"sum: terms are one or more formats, got {self.terms!r}")
        object.__setattr__(self, "terms", tuple(self.terms))

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """Those of the terms, as ``term0_…``, ``term1_…``."""
        out: dict[str, Factor] = {}
        for i, term in enumerate(self.terms):
            out |= prefixed(f"term{i}_", term.factors(out_features, in_features))
        return out

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """The terms' products, added."""
        products = [
            term.multiply(unprefixed(f"term{i}_", factors), x, out_features) for i, term in enumerate(self.terms)
        ]
        return sum(products[1:], products[0])

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The terms' matrices, added."""
        matrices = [
            term.dense(unprefixed(f"term{i}_", factors), out_features, in_features) for i, term in enumerate(self.terms)
        ]
        return sum(matrices[1:], matrices[0])

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """Those of the terms."""
        return [
            Component(f"term{i}_{part.factor}", part.fan_in, part.fan_out, part.outputs)
            for i, term in enumerate(self.terms)
            for part in term.components(out_features, in_features)
        ]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """The terms' costs, added: a term may count its multiply-adds in its own way."""
        costs = [term.cost(out_features, in_features, dtype) for term in self.terms]
        return sum(costs[1:], costs[0])

    def deploy(
        self, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, dict[str, Tensor]]:
        """The sum of the terms' inference forms."""
        terms: list[Format] = []
        out: Factors = {}
        for i, term in enumerate(self.terms):
            form, own = term.deploy(unprefixed(f"term{i}_", factors), out_features, in_features)
            terms.append(form)
            out |= prefixed(f"term{i}_", own)
        return type(self)(tuple(terms)), out

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Each term as it starts alone, the last stage scaled so that the variances add up to one term's."""
        for i, term in enumerate(self.terms):
            own = unprefixed(f"term{i}_", factors)
            term.initialize(own, out_features, in_features, generator)
            stages = term.components(out_features, in_features)
            if stages:
                own[stages[-1].factor].mul_(len(self.terms) ** -0.5)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """Equal shares; what a term leaves is added to the share of the next, and a last pass spends the rest."""

        def amount(term: Format) -> int:
            return budget.amount(term.cost(out_features, in_features, budget.dtype))

        share = budget.limit // len(self.terms)
        terms: list[Format] = []
        left = budget.limit
        for to_come, term in zip(reversed(range(len(self.terms))), self.terms, strict=True):
            terms.append(term.sized(out_features, in_features, budget.with_limit(left - to_come * share)))
            left -= amount(terms[-1])
        # What the last term leaves goes round once more: each term may have its own cost and all that is left.
        for i, term in enumerate(terms):
            available = left + amount(term)
            terms[i] = term.sized(out_features, in_features, budget.with_limit(available))
            left = available - amount(terms[i])
        return type(self)(tuple(terms))

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        rounds: int = 10,
        tolerance: float = 1e-3,
        **options: Any,
    ) -> Factors:
        """Each term in turn is fitted to what the others leave; a step that does not lower the error is not taken.

        Options: ``rounds`` (10, at least 1), ``tolerance`` (1e-3, relative decrease of a round at which to stop).
        """
        require_solver(self, solver, ("default",))
        if rounds < 1:
            raise IsogridError(f"sum: its fit takes at least 1 round, got rounds={rounds}")
        shape = target.shape
        parts: list[Factors] = []
        if start is not None:
            parts = [dict(unprefixed(f"term{i}_", start)) for i in range(len(self.terms))]
        matrices = [term.dense(part, *shape) for term, part in zip(self.terms, parts, strict=False)]
        residual = target - sum(matrices, torch.zeros_like(target))
        objective = squared_norm(residual, metric)
        for step in range(rounds):
            before = objective
            for i, term in enumerate(self.terms):
                known = i < len(parts)
                wish = residual + matrices[i] if known else residual
                part = term.fit(wish, metric, generator=generator)
                matrix = term.dense(part, *shape)
                value = squared_norm(wish - matrix, metric)
                if known and value >= objective:
                    continue
                if known:
                    parts[i], matrices[i] = part, matrix
                else:
                    parts.append(part)
                    matrices.append(matrix)
                residual, objective = wish - matrix, value
            if on_step is not None:
                on_step(step, objective)
            if before - objective <= tolerance * before:
                break
        out: Factors = {}
        for i, part in enumerate(parts):
            out |= prefixed(f"term{i}_", part)
        return out
