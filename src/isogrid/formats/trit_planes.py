"""Trit planes: every weight is a sum of up to three scales, each added, subtracted or left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, squared_norm
from isogrid.fitting.trit_matrices import feed_back, fit_under, split_as_published, split_matrix
from isogrid.fitting.trits import MOST_PLANES
from isogrid.formats.checks import require_solver
from isogrid.formats.coded import Coded
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.traits import Traits
from isogrid.kernels import PACKINGS, pack_trits, row_bytes, trit_matrix, trit_product, unpack_trits


@dataclass(frozen=True)
class TritPlanes(Coded):
    """``W[i, j] = Σ_k scales[i, q, k] · trit[i, j, k]``, trits in {-1, 0, 1}, q the group of input j (PTQTP, Xiao et
    al. 2025).

    Two planes give nine levels in each group of a row, set by two numbers. What is stored in scales of 16 bits and
    groups of 128: 4.25 bits a weight, 3.45 packed in base three. On Gaussian weights the error lies between those of
    plain rounding to 3 and to 4 bits. Scales are trained, codes are not.

    Attributes:
        planes: 1 to 3.
        group: inputs that share scales; the last group of a row may be shorter.
        packing: "two_bit", the faster one, or "base_three", five trits a byte (`kernels.trits`).
    """

    planes: int = 2
    group: int = 128
    packing: str = "two_bit"

    name: ClassVar[str] = "trit_planes"
    traits: ClassVar[Traits] = Traits(linear_in_factors=True)

    def __post_init__(self) -> None:
        for field, value, most in (("planes", self.planes, MOST_PLANES), ("group", self.group, math.inf)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise IsogridError(f"trit_planes: {field} is a whole number in 1 … {most}, got {value!r}")
        if self.packing not in PACKINGS:
            raise IsogridError(f"trit_planes: packing is one of {', '.join(PACKINGS)}; got {self.packing!r}")

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``scales (out, groups, planes)`` and ``codes (out, bytes of a row)`` uint8."""
        groups = -(-in_features // self.group)
        width = row_bytes(in_features, self.planes, self.packing)
        return {
            "scales": Factor((out_features, groups, self.planes)),
            "codes": Factor((out_features, width), torch.uint8, "code"),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """A product that reads packed codes, or where there is none one with the matrix written out in pieces."""
        return trit_product(x, factors["codes"], factors["scales"], self.group, self.packing)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The matrix written out."""
        return trit_matrix(factors["codes"], factors["scales"], in_features, self.group, self.packing)

    def trits(self, factors: Mapping[str, Tensor], in_features: int) -> Tensor:
        """``(out, in, planes)`` int8."""
        return unpack_trits(factors["codes"], in_features, self.planes, self.packing)

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Random trits; scales a third of the one before, so that levels are evenly spaced, of a dense start's size."""
        device = generator.device if generator is not None else "cpu"
        shape = (out_features, in_features, self.planes)
        drawn = torch.randint(-1, 2, shape, generator=generator, device=device, dtype=torch.int8)
        factors["codes"].copy_(pack_trits(drawn, self.packing))
        shares = 3.0 ** -torch.arange(self.planes)
        deviation = math.sqrt(max(min(out_features, in_features), 1)) / max(in_features, 1)
        shares *= deviation / float((shares.square().sum() * 2 / 3).sqrt())  # a trit's variance is 2/3
        factors["scales"].copy_(shares.expand_as(factors["scales"]))

    def _fit(
        self,
        target: Tensor,
        metric: Metric | None,
        solver: str,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator | None,
        on_step: OnStep | None,
        options: dict[str, Any],
    ) -> tuple[Factors, Factors, Metric | None]:
        """Trits are chosen for scales as they will be stored."""
        if isinstance(target, Tensor) and target.is_floating_point():
            options = {"stored": target.dtype} | options
        return super()._fit(target, metric, solver, start, generator, on_step, options)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        sweeps: int = 2,
        published: bool = False,
        stored: torch.dtype | None = None,
        **options: Any,
    ) -> Factors:
        """Each group's scales from many starts; under a metric with error feedback from column to column.

        Solvers: default; "multistart", each group alone, without the metric; "diagonal", each group alone, errors
        weighted by the inputs' second moments; "feedback", without ``sweeps``; "ptqtp", the published loop, ties in
        lexicographic order.

        Options: ``sweeps`` (2) of all scales and all trits after the feedback, neither of which raises the error;
        ``published`` (false), let no group end worse than by the published loop, without a metric; ``stored``, what
        scales are rounded to before trits are chosen: the target's dtype.
        """
        require_solver(self, solver, ("default", "multistart", "diagonal", "feedback", "ptqtp"))
        if sweeps < 0:
            raise IsogridError(f"trit_planes: sweeps is at least 0, got {sweeps}")
        if solver == "ptqtp" and self.planes != 2:
            raise IsogridError(f"trit_planes: the published loop has two planes, got planes={self.planes}")
        group = min(self.group, target.shape[1])
        if solver == "ptqtp":
            trits, scales = split_as_published(target, group, dtype=stored)
        elif metric is None or solver in ("multistart", "diagonal"):
            weights = metric.matrix.diagonal() if metric is not None and solver == "diagonal" else None
            trits, scales = split_matrix(target, self.planes, group, weights, dtype=stored, published=published)
        elif solver == "feedback":
            trits, scales = feed_back(target, metric, self.planes, group, dtype=stored)
        else:
            trits, scales = fit_under(target, metric, self.planes, group, sweeps=sweeps, dtype=stored)
        found = {"scales": scales, "codes": pack_trits(trits, self.packing)}
        if on_step is not None:
            on_step(0, squared_norm(target - self.dense(found, *target.shape), metric))
        return found
