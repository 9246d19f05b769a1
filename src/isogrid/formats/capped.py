"""RMS-capped factors with gains: what keeps structured transformers from growing without bound in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.factors import Factor, Factors, prefixed, unprefixed
from isogrid.formats.monarch import Monarch
from isogrid.formats.start import Component

# Inside the root, so that a factor of zeros has a finite gradient.
RMS_EPSILON = 1e-8


@dataclass(frozen=True)
class Capped(Format):
    """Every weight factor F of ``inner`` becomes ``gain · F / max(1, RMS(F) / σ)``, σ its initial standard deviation.

    Below the cap a factor acts as it is; above, only its direction and its gain count (Qiu et al. 2024, section 4).
    Deployed, the caps and gains are folded into the factors.

    Attributes:
        inner: the format within.
    """

    inner: Format = field(default_factory=Monarch)

    name: ClassVar[str] = "capped"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Format):
            raise IsogridError(f"capped: inner is a format, got {self.inner!r}")

    def _weights(self, out_features: int, in_features: int) -> list[str]:
        specs = self.inner.factors(out_features, in_features)
        return [name for name, spec in specs.items() if spec.role == "weight"]

    def _caps(self, out_features: int, in_features: int) -> dict[str, float]:
        """σ of each weight factor: the standard deviation of the default start."""
        stages = {stage.factor: stage for stage in self.inner.components(out_features, in_features)}
        return {
            name: math.sqrt(min(stages[name].fan_in, stages[name].fan_out)) / stages[name].fan_in
            if name in stages
            else 1.0
            for name in self._weights(out_features, in_features)
        }

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``inner_…``, and ``gain_<factor> ()`` for each weight factor."""
        gains = {f"gain_{name}": Factor((), role="gain") for name in self._weights(out_features, in_features)}
        return prefixed("inner_", self.inner.factors(out_features, in_features)) | gains

    def _capped(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> dict[str, Tensor]:
        """The inner factors as they act."""
        inner = unprefixed("inner_", factors)
        for name, cap in self._caps(out_features, in_features).items():
            value = inner[name]
            rms = (value.float().square().mean() + RMS_EPSILON).sqrt() if value.numel() else torch.ones(())
            if value.dtype == torch.float64:
                rms = (value.square().mean() + RMS_EPSILON).sqrt()
            scale = factors[f"gain_{name}"] / (rms / cap).clamp(min=1)
            inner[name] = value * scale.to(value.dtype)
        return inner

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """The inner product with the capped factors."""
        return self.inner.multiply(self._capped(factors, out_features, x.shape[-1]), x, out_features)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The inner matrix of the capped factors."""
        return self.inner.dense(self._capped(factors, out_features, in_features), out_features, in_features)

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """Those of the inner format."""
        return [
            Component(f"inner_{part.factor}", part.fan_in, part.fan_out, part.outputs)
            for part in self.inner.components(out_features, in_features)
        ]

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """The inner format's start, gains of one."""
        self.inner.initialize(unprefixed("inner_", factors), out_features, in_features, generator)
        for name in self._weights(out_features, in_features):
            factors[f"gain_{name}"].fill_(1)

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """That of the inner format and one gain per weight factor."""
        gains = len(self._weights(out_features, in_features))
        return self.inner.cost(out_features, in_features, dtype) + Cost(gains, gains, gains * dtype.itemsize * 8)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """The inner format, sized to the budget less one gain per weight factor."""
        # The number of gains is the same for all sizes of the inner format: take it from any member.
        smaller = type(self)(self.inner.sized(out_features, in_features, budget))
        extra = len(smaller._weights(out_features, in_features))
        itemsize = budget.dtype.itemsize
        rest = (
            Budget(parameters=max(budget.parameters - extra, 0))
            if budget.parameters is not None
            else Budget(bytes=max((budget.bytes or 0) - extra * itemsize, 0), dtype=budget.dtype)
        )
        return type(self)(self.inner.sized(out_features, in_features, rest))

    def candidates(self, out_features: int, in_features: int, budget: Budget) -> Iterable[Self]:
        """One for each candidate of the inner format that leaves room for the gains."""
        for inner in self.inner.candidates(out_features, in_features, budget):
            member = type(self)(inner)
            if budget.allows(member.cost(out_features, in_features, budget.dtype)):
                yield member

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """The inner format's: its matrices are the same."""
        return self.inner.lower_bound(target, metric)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        generator: torch.Generator,
        on_step: OnStep | None,
        **options: Any,
    ) -> Factors:
        """The inner fit; gains make up for the caps, so that the matrix is the inner fit's."""
        inner = self.inner.fit(target, metric, solver=solver, generator=generator, on_step=on_step, **options)
        found = prefixed("inner_", inner)
        for name, cap in self._caps(*target.shape).items():
            value = inner[name].to(torch.float64)
            rms = (value.square().mean() + RMS_EPSILON).sqrt() if value.numel() else torch.ones((), dtype=torch.float64)
            found[f"gain_{name}"] = (rms / cap).clamp(min=1)
        return found

    def deploy(
        self, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, dict[str, Tensor]]:
        """The inner format with caps and gains folded in."""
        return self.inner.deploy(self._capped(factors, out_features, in_features), out_features, in_features)
