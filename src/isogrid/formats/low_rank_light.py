"""Low-Rank Light: the same matrices as low rank, without the k² numbers that low rank spends twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.fitting import Metric, dominant_inputs, low_rank
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.start import Component, normal_
from isogrid.formats.traits import Traits
from isogrid.kernels import added_to_chosen, dense_product


@dataclass(frozen=True)
class LowRankLight(Format):
    """``W[:, order] = left · [I | rest]``: rank · (out + in - rank) parameters and one permutation of the inputs.

    ``rank`` chosen inputs pass straight through, the others are added to them through ``rest``; then ``left`` mixes
    (Camenisch 2025). Never larger than dense, and equal to it at full rank. The inputs are chosen so that no entry of
    ``rest`` is much larger than one: the form loses no precision against low rank.

    Attributes:
        rank: number of inputs that pass through; None until `sized`.
    """

    rank: int | None = None

    name: ClassVar[str] = "low_rank_light"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True,
        optimal=True,
        optimal_under_metric=True,
        monotone_in_budget=True,
    )

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``order (in,)`` int32, ``rest (rank, in - rank)``, ``left (out, rank)``."""
        rank = require_rank(self, self.rank, min(out_features, in_features))
        return {
            "order": Factor((in_features,), torch.int32, "index"),
            "rest": Factor((rank, in_features - rank)),
            "left": Factor((out_features, rank)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """Gather, one product into the chosen inputs, one product out."""
        hidden = added_to_chosen(x, factors["order"], factors["rest"])
        return dense_product(hidden, factors["left"], bias)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """``left · [I | rest]`` with its columns back in place."""
        left = factors["left"]
        columns = torch.cat([left, left @ factors["rest"]], dim=1)
        return columns.index_select(1, factors["order"].argsort())

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``rest``, then ``left``."""
        rank = require_rank(self, self.rank)
        stages = [Component("left", rank, out_features, out_features)]
        if rank < in_features:
            stages.insert(0, Component("rest", in_features - rank, rank, rank))
        return stages

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """The first inputs pass through; ``rest`` adds as much variance as they have, and ``left`` makes up for it."""
        rank = require_rank(self, self.rank)
        factors["order"].copy_(torch.arange(in_features))
        doubled = rank < in_features
        if doubled:
            normal_(factors["rest"], 1 / math.sqrt(in_features - rank), generator)
        std = math.sqrt(min(rank, out_features)) / rank
        normal_(factors["left"], std / math.sqrt(2) if doubled else std, generator)

    def error_curve(self, tails: Sequence[float]) -> list[float]:
        """Tails of the whitened spectrum: one decomposition tells all ranks."""
        return list(tails)

    def solve(
        self, target: Tensor, metric: Metric | None, *, solver: str, generator: torch.Generator, **options: Any
    ) -> Factors:
        """The low-rank optimum, rewritten without loss through dominant inputs.

        Solvers: those of low rank.
        """
        require_solver(self, solver, ("default", "svd", "gram", "randomized"))
        rank = require_rank(self, self.rank)
        left, right = low_rank(target, metric, rank, solver=solver, generator=generator)  # type: ignore[arg-type]
        # Orthonormal rows that span the row space; QR completes them where the target has fewer directions.
        basis = torch.linalg.qr(right.mT).Q.mT  # (rank, in)
        order, rest = dominant_inputs(basis)
        # left · right restricted to the chosen inputs is the new left factor.
        return {"order": order, "rest": rest, "left": left @ right[:, order[:rank]]}
