"""A format whose factors are held in codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric, OnStep, cholesky, squared_norm
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import solver_options, too_small
from isogrid.formats.factors import Factor, Factors, prefixed, unprefixed
from isogrid.formats.low_rank import LowRank
from isogrid.formats.start import Component
from isogrid.formats.trit_planes import TritPlanes

# Codes have to be smaller than the numbers in this dtype: which factors are held in codes depends on no other.
PLAIN_DTYPE = torch.bfloat16
RIDGE = 1e-12


@dataclass(frozen=True)
class Stored(Format):
    """``inner`` with its weight factors written in another format, one of codes.

    A factor of more than two axes is a matrix whose rows go over all axes but the last; one of one axis is a row. A
    factor that codes would not make smaller than bfloat16 stays as it is.

    Attributes:
        inner: the format within.
        codes: the format that its factors are written in.
    """

    inner: Format = field(default_factory=LowRank)
    codes: Format = field(default_factory=TritPlanes)

    name: ClassVar[str] = "stored"

    def __post_init__(self) -> None:
        for what, value in (("inner", self.inner), ("codes", self.codes)):
            if not isinstance(value, Format):
                raise IsogridError(f"stored: {what} is a format, got {value!r}")

    def _coded(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """The factors that are held in codes, with their sizes as matrices."""
        found = {}
        for name, spec in self.inner.factors(out_features, in_features).items():
            if spec.role != "weight" or spec.dtype is not None or not spec.numel:
                continue
            shape = math.prod(spec.shape[:-1]), spec.shape[-1] if spec.shape else 1
            plain = spec.numel * PLAIN_DTYPE.itemsize * 8
            if self.codes.cost(*shape, PLAIN_DTYPE).bits < plain:
                found[name] = shape
        return found

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``inner_…``; a factor held in codes by those of its format, ``inner_left_scales``, ``inner_left_codes``."""
        coded = self._coded(out_features, in_features)
        found: dict[str, Factor] = {}
        for name, spec in self.inner.factors(out_features, in_features).items():
            own = prefixed(f"{name}_", self.codes.factors(*coded[name])) if name in coded else {name: spec}
            found |= prefixed("inner_", own)
        return found

    def _codes_of(self, name: str, inner: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors that hold one factor."""
        return {part: inner[f"{name}_{part}"] for part in self.codes.factors(*shape)}

    def decoded(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> dict[str, Tensor]:
        """The factors of the inner format, differentiable in those that are trained."""
        coded = self._coded(out_features, in_features)
        inner = unprefixed("inner_", factors)
        return {
            name: self.codes.dense(self._codes_of(name, inner, coded[name]), *coded[name]).view(spec.shape)
            if name in coded
            else inner[name]
            for name, spec in self.inner.factors(out_features, in_features).items()
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """The inner product with the factors written out; where it is a chain of matrices, products with codes."""
        coded = self._coded(out_features, x.shape[-1])
        if not self.inner.chain or not coded:
            return self.inner.multiply(self.decoded(factors, out_features, x.shape[-1]), x, out_features)
        inner = unprefixed("inner_", factors)
        for name in self.inner.chain:
            if name in coded:
                x = self.codes.multiply(self._codes_of(name, inner, coded[name]), x, coded[name][0])
            else:
                x = torch.nn.functional.linear(x, inner[name])
        return x

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The inner matrix of the factors written out."""
        return self.inner.dense(self.decoded(factors, out_features, in_features), out_features, in_features)

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """Those of the inner format whose factors stay as they are."""
        coded = self._coded(out_features, in_features)
        return [
            Component(f"inner_{part.factor}", part.fan_in, part.fan_out, part.outputs)
            for part in self.inner.components(out_features, in_features)
            if part.factor not in coded
        ]

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """The inner format's start, its factors written in codes."""
        specs = self.inner.factors(out_features, in_features)
        device = next(iter(factors.values())).device
        begin = {
            name: torch.zeros(spec.shape, dtype=spec.dtype or torch.float32, device=device)
            for name, spec in specs.items()
        }
        self.inner.initialize(begin, out_features, in_features, generator)
        for name, value in self.written(begin, out_features, in_features).items():
            factors[name].copy_(value)

    def written(
        self,
        inner: Factors,
        out_features: int,
        in_features: int,
        *,
        target: Tensor | None = None,
        metric: Metric | None = None,
        generator: torch.Generator | None = None,
        stored: torch.dtype | None = None,
        on_step: OnStep | None = None,
    ) -> Factors:
        """Factors of the inner format written in codes, one after the other.

        With a target ``(out, in)``, and an inner format that is a chain of matrices, each is coded under the metric of
        what it is given by those before, the last after it was fitted anew to these; otherwise each by itself.

        Args:
            inner: factors of the inner format.
            out_features: rows of the matrix.
            in_features: its columns.
            target: what the codes' product is to come near; None: each factor.
            metric: of the inputs; None is the identity.
            generator: of the codes' fits.
            stored: what scales are rounded to before codes are chosen: the factors' dtype.
            on_step: told the squared error after each factor; needs a target.
        """
        coded = self._coded(out_features, in_features)
        extra: dict[str, Any] = {} if stored is None else {"stored": stored}
        found: Factors = {}
        chain = self.inner.chain if target is not None else ()
        seen: Tensor | None = None  # the product of the matrices written so far
        for name in chain or inner:
            value = inner[name]
            own_metric = None
            if chain:
                own_metric = metric
                if seen is not None:
                    moved = seen @ seen.mT if metric is None else seen @ metric.matrix @ seen.mT
                    own_metric = _metric_of(moved)
                    if own_metric is not None and name == chain[-1]:
                        assert target is not None
                        value = _regressed(target, seen, metric, own_metric)
            if name in coded:
                own = self.codes.fit(value.reshape(coded[name]), own_metric, generator=generator, **extra)
                value = self.codes.dense(own, *coded[name]).view(value.shape)
                found |= prefixed(f"inner_{name}_", own)
            else:
                if stored is not None and value.is_floating_point():  # an order of inputs is no number to round
                    value = value.to(stored).to(value.dtype)
                found[f"inner_{name}"] = value
            if chain:
                seen = value if seen is None else value @ seen
            if on_step is not None and target is not None:
                inner = inner | {name: value}
                error = target - self.inner.dense(inner, out_features, in_features)
                on_step(len(found), squared_norm(error, metric))
        return {name: found[name] for name in self.factors(out_features, in_features)}

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """As stored; multiply-adds of the inner product."""
        counted = super().cost(out_features, in_features, dtype)
        return Cost(counted.parameters, self.inner.cost(out_features, in_features, dtype).multiply_adds, counted.bits)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Stored:
        """Within parameters: the inner format sized to them. Within bytes: the largest one whose codes fit."""

        def member(parameters: int) -> Stored:
            return replace(self, inner=self.inner.sized(out_features, in_features, Budget(parameters=parameters)))

        if budget.parameters is not None:
            found = member(budget.parameters)
            cost = found.cost(out_features, in_features, budget.dtype)
            if budget.allows(cost):
                return found
            raise too_small(found, out_features, in_features, budget, cost)
        best: Stored | None = None
        low, high = 1, 8 * budget.limit  # no code is smaller than a bit a number
        while low <= high:
            middle = (low + high) // 2
            try:
                found = member(middle)
            except BudgetError:
                low = middle + 1
                continue
            cost = found.cost(out_features, in_features, budget.dtype)
            if budget.allows(cost):
                best, low = found, middle + 1
            else:
                high = middle - 1
        if best is None:
            raise self._too_small(out_features, in_features, budget)
        return best

    def sized_parts(self) -> tuple[Format, ...]:
        """The inner format: codes are as they are asked for."""
        return (self.inner,)

    def _too_small(self, out_features: int, in_features: int, budget: Budget) -> BudgetError:
        """What to say where not even the smallest member fits."""
        inner = self.inner if self.inner.size_field is None else self.inner.with_size(1)
        smallest = replace(self, inner=inner)
        try:
            cost = smallest.cost(out_features, in_features, budget.dtype)
        except IsogridError:  # sizes that are chosen deeper inside
            return BudgetError(
                f"{self.label()}: no {out_features} x {in_features} member is that small, the budget is {budget}; "
                "keep more, or choose another format"
            )
        return too_small(smallest, out_features, in_features, budget, cost)

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
        """Codes are chosen for scales as they will be stored."""
        if "stored" in solver_options(self.codes) and isinstance(target, Tensor) and target.is_floating_point():
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
        stored: torch.dtype | None = None,
        **options: Any,
    ) -> Factors:
        """The inner fit, then `written`. Solvers and options are those of the inner format.

        Options: ``stored``, what scales are rounded to before codes are chosen: the target's dtype.
        """
        begin = None if start is None else self.decoded(start, *target.shape)
        inner = self.inner.fit(target, metric, solver=solver, start=begin, generator=generator, **options)
        return self.written(
            inner, *target.shape, target=target, metric=metric, generator=generator, stored=stored, on_step=on_step
        )

    def deploy(
        self, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, dict[str, Tensor]]:
        """Itself: the inner format's inference form would have to be coded anew."""
        return self, dict(factors)


def _metric_of(moment: Tensor) -> Metric | None:
    """The metric of a moment; None where it is zero throughout."""
    return Metric((moment + moment.mT) / 2, damping=0.0) if float(moment.abs().max()) > 0 else None


def _regressed(target: Tensor, seen: Tensor, metric: Metric | None, own: Metric) -> Tensor:
    """The last matrix of a chain, the best for what the others have become: ``T M Sᵀ (S M Sᵀ)⁻¹``."""
    wish = target @ seen.mT if metric is None else target @ metric.matrix @ seen.mT
    return torch.cholesky_solve(wish.mT, cholesky(own.matrix)).mT
