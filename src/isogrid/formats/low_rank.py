"""Low rank: W = left · right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.fitting import Metric, low_rank
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.formulations import Formulation, low_rank_einsum, low_rank_published
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits
from isogrid.kernels import low_rank_product


@dataclass(frozen=True)
class LowRank(Format):
    """``W = left · right`` with ``left (out, rank)``, ``right (rank, in)``: rank · (out + in) parameters.

    The format for matrices whose (whitened) spectrum falls fast. Above ``rank = out · in / (out + in)`` it is larger
    than the dense matrix; `LowRankLight` writes the same matrices without that waste.

    Attributes:
        rank: number of columns of ``left``; None until `sized`.
    """

    rank: int | None = None

    name: ClassVar[str] = "low_rank"
    size_field: ClassVar[str] = "rank"
    chain: ClassVar[tuple[str, ...]] = ("right", "left")
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True,
        optimal=True,
        optimal_under_metric=True,
        monotone_in_budget=True,
        linear_in_factors=True,
    )

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``right (rank, in)``, ``left (out, rank)``."""
        rank = require_rank(self, self.rank, min(out_features, in_features))
        return {"right": Factor((rank, in_features)), "left": Factor((out_features, rank))}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """Two products; the intermediate has ``rank`` features."""
        return low_rank_product(x, factors["right"], factors["left"], bias)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """``left · right``."""
        return factors["left"] @ factors["right"]

    def formulations(self) -> dict[str, Formulation]:
        """As its paper writes it, and as einsum."""
        return {"published": low_rank_published, "einsum": low_rank_einsum}

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``right``, then ``left``."""
        rank = require_rank(self, self.rank)
        return [
            Component("right", in_features, rank, rank),
            Component("left", rank, out_features, out_features),
        ]

    def error_curve(self, tails: Sequence[float]) -> list[float]:
        """Tails of the whitened spectrum: one decomposition tells all ranks."""
        return list(tails)

    def solve(
        self, target: Tensor, metric: Metric | None, *, solver: str, generator: torch.Generator, **options: Any
    ) -> Factors:
        """Whitened truncated SVD, the global minimum (Eckart-Young under the metric's root).

        Solvers: default, svd, gram, randomized (see `isogrid.fitting.leading_left`).
        """
        require_solver(self, solver, ("default", "svd", "gram", "randomized"))
        rank = require_rank(self, self.rank)
        left, right = low_rank(target, metric, rank, solver=solver, generator=generator)  # type: ignore[arg-type]
        return {"right": right, "left": left}
