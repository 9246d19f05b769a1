"""The dense matrix itself: the reference of every other format, and what an allocation leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.fitting import Metric
from isogrid.formats.base import Format
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.traits import Traits


@dataclass(frozen=True)
class Dense(Format):
    """``W`` itself, ``(out, in)``: out · in parameters."""

    name: ClassVar[str] = "dense"
    chain: ClassVar[tuple[str, ...]] = ("matrix",)
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True,
        optimal=True,
        optimal_under_metric=True,
        monotone_in_budget=True,
        linear_in_factors=True,
    )

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``matrix (out, in)``."""
        return {"matrix": Factor((out_features, in_features))}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """``x Wᵀ``."""
        return torch.nn.functional.linear(x, factors["matrix"])

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The factor itself."""
        return factors["matrix"]

    def solve(self, target: Tensor, metric: Metric | None, *, solver: str, **options: Any) -> Factors:
        """The target."""
        require_solver(self, solver, ("default",))
        return {"matrix": target.clone()}
