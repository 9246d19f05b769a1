"""Unstructured sparsity: any entries, as many as the budget allows; the reference line of the studies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric, cholesky
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.start import Component, normal_
from isogrid.formats.traits import Traits

# Rows are refitted in groups of about this many numbers in their normal equations.
REFIT_NUMBERS = 2**25


@dataclass(frozen=True)
class Unstructured(Format):
    """The entries that matter most, anywhere: density · out · in values and their positions.

    A reference, not a way to be fast: the product scatters the values into a dense matrix first. Its bits count the
    positions (int32), which at float32 are half of what it stores.

    Attributes:
        density: fraction of the entries in (0, 1]; at least one entry is kept. None until `sized`.
    """

    density: float | None = None

    name: ClassVar[str] = "unstructured"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, monotone_in_budget=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        if self.density is not None and not 0 < self.density <= 1:
            raise IsogridError(f"unstructured: density is a fraction in (0, 1], got {self.density!r}")

    def nonzeros(self, out_features: int, in_features: int) -> int:
        """Number of entries kept."""
        if self.density is None:
            raise IsogridError("unstructured has no density yet: give density=… or call .sized(out, in, budget)")
        return max(1, round(self.density * out_features * in_features))

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``values (nonzeros,)`` and ``positions (nonzeros,)`` int32, row-major and ascending."""
        count = self.nonzeros(out_features, in_features)
        return {"values": Factor((count,)), "positions": Factor((count,), torch.int32, "index")}

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The values scattered into zeros."""
        values = factors["values"]
        flat = torch.zeros(out_features * in_features, dtype=values.dtype, device=values.device)
        return flat.index_put((factors["positions"].long(),), values).view(out_features, in_features)

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """A dense product with the scattered matrix."""
        return torch.nn.functional.linear(x, self.dense(factors, out_features, x.shape[-1]))

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """None: there is no dense stage."""
        return []

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """As stored; multiply-adds of the dense product that is really done."""
        counted = super().cost(out_features, in_features, dtype)
        return Cost(counted.parameters, out_features * in_features, counted.bits)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """As many entries as fit."""
        entry = replace(self, density=1.0).cost(1, 1, budget.dtype)
        limit = budget.parameters if budget.parameters is not None else budget.bytes
        assert limit is not None
        count = min(limit // budget.amount(entry), out_features * in_features)
        if count < 1:
            raise BudgetError(
                f"unstructured: one entry of a {out_features} x {in_features} matrix takes {budget.amount(entry)}, "
                f"the budget is {budget}"
            )
        member = replace(self, density=count / (out_features * in_features))
        assert member.nonzeros(out_features, in_features) == count
        return member

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Random positions, values of the size that keeps variances."""
        count = factors["positions"].numel()
        normal_(
            factors["values"],
            math.sqrt(min(out_features, in_features) / (in_features * count / out_features)),
            generator,
        )
        drawn = torch.rand(out_features * in_features, generator=generator).topk(count).indices.sort().values
        factors["positions"].copy_(drawn)

    def solve(self, target: Tensor, metric: Metric | None, *, solver: str, **options: Any) -> Factors:
        """The largest entries; under a metric those of the largest saliency, then refitted together.

        Saliency is ``|W_ij| / (M⁻¹_jj)^½``, what leaving an entry out costs when the rest of its row makes up for
        it (LeCun et al. 1990). Given the positions, each row is the exact minimiser. Solvers: default; "projection"
        ignores the metric.
        """
        require_solver(self, solver, ("default", "projection"))
        m, n = target.shape
        count = self.nonzeros(m, n)
        weighted = metric is not None and solver == "default"
        score = target.abs()
        if weighted and metric is not None:
            score = score / torch.cholesky_inverse(metric.root).diagonal().sqrt()
        # Ties go to the earlier entry, so that equal input gives equal output.
        positions = score.flatten().sort(descending=True, stable=True).indices[:count].sort().values
        if not weighted or metric is None:
            return {"values": target.flatten()[positions], "positions": positions}
        values = _refit(target, metric, positions)
        return {"values": values, "positions": positions}


def _refit(target: Tensor, metric: Metric, positions: Tensor) -> Tensor:
    """The best values at given positions, row by row: ``(T M)[i, s] M[s, s]⁻¹`` (fitting theory 3.4), batched."""
    m, n = target.shape
    moment, wish = metric.matrix, target @ metric.matrix
    rows, columns = positions // n, positions % n
    counts = torch.bincount(rows, minlength=m)
    width = int(counts.max())
    offset = counts.cumsum(0) - counts
    place = torch.arange(positions.numel(), device=target.device) - offset[rows]
    support = torch.zeros(m, width, dtype=torch.long, device=target.device)
    support[rows, place] = columns
    used = torch.zeros(m, width, dtype=torch.bool, device=target.device)
    used[rows, place] = True
    out = torch.zeros(m, width, dtype=target.dtype, device=target.device)
    step = max(1, REFIT_NUMBERS // max(width * width, 1))
    for start in range(0, m, step):
        part = slice(start, start + step)
        both = used[part].unsqueeze(2) & used[part].unsqueeze(1)
        gram = moment[support[part].unsqueeze(2), support[part].unsqueeze(1)] * both
        gram = gram + torch.diag_embed((~used[part]).to(target.dtype))  # unused places: one equation x = 0
        right = wish[part].gather(1, support[part]) * used[part]
        out[part] = torch.cholesky_solve(right.unsqueeze(-1), cholesky(gram))[..., 0]
    return out[rows, place]
