"""What a matrix can be: the one interface that formats implement and every job is written against."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import FitReport, Metric, OnStep, fit_general, fit_thoroughly, squared_norm, widened
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import check_factors, check_options, check_target, require_solver, too_small
from isogrid.formats.factors import Factor, Factors, new_factors
from isogrid.formats.formulations import Formulation
from isogrid.formats.labels import as_json, spoken
from isogrid.formats.start import Component, gaussian_start, orthonormal_start
from isogrid.formats.traits import Traits


@dataclass(frozen=True)
class Format(ABC):
    """A way to write a matrix, with its hyper-parameters; frozen, knows no shape, JSON-able.

    A subclass is a frozen dataclass with a class attribute ``name``, under which it is registered. It must say what
    its factors are (`factors`) and how they multiply (`multiply`); everything else has a default. Hyper-parameters are
    exactly what `factors` needs beside the two sizes.
    """

    name: ClassVar[str]
    traits: ClassVar[Traits] = Traits()
    size_field: ClassVar[str | None] = None
    """The integer hyper-parameter that a budget moves; larger costs more."""
    open_field: ClassVar[str | None] = None
    """What a budget chooses where it is no such integer."""
    chain: ClassVar[tuple[str, ...]] = ()
    """Factors whose product is the matrix, the one applied first named first; () where it is more than a product."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            known = REGISTRY.get(cls.name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise IsogridError(f"a format named {cls.name!r} exists: {known.__module__}.{known.__qualname__}")
            REGISTRY[cls.name] = cls

    # ---- what a format must say --------------------------------------------------------------------------------

    @abstractmethod
    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """The tensors of an ``(out, in)`` matrix, by name, in order.

        Raises:
            IsogridError: the hyper-parameters don't suit the sizes.
        """

    @abstractmethod
    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """``x (..., in) -> (..., out)``, differentiable in x and the trainable factors."""

    # ---- what has a default ------------------------------------------------------------------------------------

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """`multiply`, and a bias ``(out,)`` added; formats with products of their own add it within them."""
        y = self.multiply(factors, x, out_features)
        return y if bias is None else y + bias.to(y.dtype)

    def formulations(self) -> dict[str, Formulation]:
        """Other ways to write `multiply` ("published", "einsum"), for benchmarks to time beside it. Default: none."""
        return {}

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The ``(out, in)`` matrix the factors stand for, differentiable."""
        like = next(value for value in factors.values() if value.is_floating_point())
        identity = torch.eye(in_features, dtype=like.dtype, device=like.device)
        return self.multiply(factors, identity, out_features).mT

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """The dense stages of the product, in order. Default: every weight factor ``(..., fan_out, fan_in)``."""
        return [
            Component(name, factor.shape[-1], factor.shape[-2], factor.numel // factor.shape[-1])
            for name, factor in self.factors(out_features, in_features).items()
            if factor.role == "weight" and len(factor.shape) >= 2 and factor.numel
        ]

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fill the factors in place for training from scratch.

        Weights are Gaussian with standard deviation ``sqrt(min(fan_in, fan_out)) / fan_in`` per component (Qiu et al.
        2024, section 3.2); gains are one, structure and codes zero, indices count up.
        """
        gaussian_start(
            factors, self.factors(out_features, in_features), self.components(out_features, in_features), generator
        )

    def fit(
        self,
        target: Tensor,
        metric: Metric | None = None,
        *,
        solver: str = "default",
        start: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Factors:
        """Choose factors so that ``||(target - dense) M^½||_F`` is small; `fit_and_report` also says how well it went.

        Args:
            target: ``(out, in)``, any floating dtype; the factors come back in it. Solved in float64.
            metric: metric of the ``in`` inputs; None is the identity.
            solver: one of the format's solvers; "general": the format's own fit, improved by the one solver that
                serves every format (`solve` of the base class), which takes longer.
            start: factors to improve, for iterative solvers.
            generator: source of randomness; without one a fixed seed is used, so equal input gives equal output.
            on_step: called with (iteration, objective) by iterative solvers.
            options: the solver's own.

        Raises:
            IsogridError: target not a finite floating matrix, metric of another size, unknown solver or option.
        """
        factors, _, _ = self._fit(target, metric, solver, start, generator, on_step, options)
        return factors

    def fit_and_report(
        self,
        target: Tensor,
        metric: Metric | None = None,
        *,
        solver: str = "default",
        start: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> tuple[Factors, FitReport]:
        """`fit`, and what it reached: objective, the lower bound where one is known, iterations, seconds."""
        begun = time.perf_counter()
        iterations = 0

        def count(step: int, objective: float) -> None:
            nonlocal iterations
            iterations = step
            if on_step is not None:
                on_step(step, objective)

        factors, found, on_device = self._fit(target, metric, solver, start, generator, count, options)
        seconds = time.perf_counter() - begun
        wide = widened(target.detach())
        # Multiplied out in float64: rounding a product that a layer never forms is no error of the fit.
        exact = {key: widened(value) if value.is_floating_point() else value for key, value in factors.items()}
        with torch.no_grad():
            objective = squared_norm(wide - self.dense(exact, *target.shape), on_device)
            optimal = self.traits.optimal if metric is None else self.traits.optimal_under_metric
            if optimal and solver == "default":
                bound: float | None = squared_norm(wide - self.dense(found, *target.shape), on_device)
            else:
                bound = self.lower_bound(wide, on_device)
        whole = squared_norm(wide, on_device)
        # A bound is computed with its own rounding: it never says more than what was reached.
        bound = None if bound is None else min(bound, objective)
        return factors, FitReport(objective, whole, bound, iterations, seconds)

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """A value below which no member's ``||(target - dense) M^½||_F²`` lies, float64; None: none is known."""
        return None

    def error_curve(self, tails: Sequence[float]) -> list[float] | None:
        """Objectives of the fits of sizes 1, 2, …, from `fitting.rank_errors`; None where each size needs a fit."""
        return None

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
        """Factors as asked for, as they were solved for in float64, and the metric on the device of the latter."""
        check_target(target, metric)
        check_options(self, options)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        specs = self.factors(*target.shape)
        with torch.no_grad():
            wide = widened(target.detach())
            on_device = None if metric is None else metric.to(wide.device)
            begin = None
            if start is not None:
                check_factors(self, start, *target.shape)
                begin = {
                    name: value.detach().to(wide if specs[name].dtype is None else wide.device)
                    for name, value in start.items()
                }
            if solver == "general":
                # From the format's own fit, so that it is never worse than that one.
                own = self.solve(
                    wide, on_device, solver="default", start=begin, generator=generator, on_step=None, **options
                )
                optimal = self.traits.optimal if metric is None else self.traits.optimal_under_metric
                found = own
                if not optimal:
                    found = Format.solve(
                        self, wide, on_device, solver="general", start=own, generator=generator, on_step=on_step
                    )
            else:
                found = self.solve(
                    wide, on_device, solver=solver, start=begin, generator=generator, on_step=on_step, **options
                )
        out = {
            name: found[name].to(target.device, spec.dtype or target.dtype).contiguous() for name, spec in specs.items()
        }
        check_factors(self, out, *target.shape)
        return out, found, on_device

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        steps: int = 200,
        rounds: int = 10,
        restarts: int | None = None,
        **options: Any,
    ) -> Factors:
        """The format's own fit of a checked float64 target. Default: the general solver, which only multiplies.

        Where the matrix is linear in each factor, ``rounds`` (10) of alternating least squares come first; then
        ``steps`` (200, at most) of quasi-Newton descent on all factors. Besides ``start``, if there is one,
        ``restarts`` random starts are tried: a tenth of the work on each, all of it on the best quarter, and the best
        is kept; by default 1, none beside a start.
        Solvers: default, or one half of it: "alternating" (needs linearity) or "descent"; "general", which on small
        matrices that are linear in each factor searches from many starts.

        An override names its options as keyword parameters; `fit` refuses all others.
        """
        linear = self.traits.linear_in_factors
        require_solver(self, solver, ("default", "general", "descent", *(["alternating"] if linear else [])))
        out_features, in_features = target.shape
        specs = self.factors(out_features, in_features)

        def random_start() -> Factors:
            begin = new_factors(self, out_features, in_features, dtype=torch.float64, device=target.device)
            self.initialize(begin, out_features, in_features, generator)
            return begin

        problem = (
            lambda factors, x: self.multiply(factors, x, out_features),
            random_start,
            [name for name, spec in specs.items() if spec.trainable],
            [name for name, spec in specs.items() if spec.role == "weight"],
            target,
            metric,
        )
        if solver == "general":
            begin = random_start() if start is None else start
            return fit_thoroughly(*problem, start=begin, affine=linear, on_step=on_step)
        return fit_general(
            *problem,
            start=start,
            restarts=int(start is None) if restarts is None else restarts,
            rounds=rounds if linear and solver != "descent" else 0,
            steps=steps if solver != "alternating" else 0,
            on_step=on_step,
        )

    def deploy(
        self, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, dict[str, Tensor]]:
        """The inference form of the factors, with its format. Default: itself."""
        return self, dict(factors)

    def rewritten(
        self, to: Format, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, Factors] | None:
        """This very matrix in the class of ``to``, without loss and without a fit: ``(format, factors)``.

        Sizes that ``to`` leaves open are chosen here. The format may be ``to`` seen through permutations. Default:
        None, no such way is known; `linear.convert` then fits.
        """
        return None

    @torch.no_grad()
    def orthonormalize(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        """Replace every block of every weight factor by its polar factor, in place: all singular values become one.

        A block ``U S Vᵀ`` becomes ``U Vᵀ``, the nearest matrix with orthonormal rows or columns. After `initialize`
        that is the orthonormal start of structured layers (Wei et al. 2024, section 3 and its code). Gains, structure
        and indices stay.

        Raises:
            IsogridError: a weight factor is no matrix or stack of matrices, ``(blocks, fan_out, fan_in)`` or
                ``(blocks, fan_in, fan_out)``, as the cores of a tensor train aren't; nothing is changed then.
        """
        specs = self.factors(out_features, in_features)
        orthonormal_start(self.label(), factors, specs, self.components(out_features, in_features))

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """What an ``(out, in)`` matrix costs when floating factors are stored in ``dtype``.

        Default multiply-adds: one per weight, as in every product of dense stages without shared weights.
        """
        specs = self.factors(out_features, in_features).values()
        return Cost(
            parameters=sum(spec.numel for spec in specs if spec.trainable),
            multiply_adds=sum(spec.numel for spec in specs if spec.role in ("weight", "gain")),
            bits=sum(spec.numel * (spec.dtype or dtype).itemsize * 8 for spec in specs),
        )

    def size_limit(self, out_features: int, in_features: int) -> int:
        """Largest useful value of ``size_field``: beyond it the class of matrices no longer grows."""
        return min(out_features, in_features)

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """The largest member within a budget that keeps the other hyper-parameters.

        Raises:
            BudgetError: even the smallest member is too large; the message names its size.
        """
        if self.size_field is None:
            cost = self.cost(out_features, in_features, budget.dtype)
            if budget.allows(cost):
                return self
            raise too_small(self, out_features, in_features, budget, cost)
        low, high = 1, max(self.size_limit(out_features, in_features), 1)
        cost = self.with_size(low).cost(out_features, in_features, budget.dtype)
        if not budget.allows(cost):
            raise too_small(self, out_features, in_features, budget, cost)
        while low < high:  # cost grows with the size: bisection
            middle = (low + high + 1) // 2
            if budget.allows(self.with_size(middle).cost(out_features, in_features, budget.dtype)):
                low = middle
            else:
                high = middle - 1
        return self.with_size(low)

    def sized_parts(self) -> tuple[Format, ...]:
        """The formats within this one whose sizes `sized` chooses. Default: all there are."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        return tuple(part for part in parts if isinstance(part, Format))

    def candidates(self, out_features: int, in_features: int, budget: Budget) -> Iterable[Self]:
        """What an automatic choice may try within a budget. Default: the one `sized` member, if there is one."""
        try:
            yield self.sized(out_features, in_features, budget)
        except BudgetError:
            return

    # ---- spelling ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description, read back by `spelling.format_from_dict`."""
        return {"name": self.name} | {f.name: as_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def label(self) -> str:
        """Short name for tables, read back by `spelling.as_format`: ``monarch(blocks=4, rank=36)``.

        Choices left at their default are left out, except numbers: a rank or a number of blocks is always shown.
        """
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if value != default or type(value) in (int, float):
                parts.append(f"{f.name}={spoken(value)}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name

    def with_size(self, size: int) -> Self:
        """The member with another value of ``size_field``."""
        assert self.size_field is not None
        changes: dict[str, Any] = {self.size_field: size}
        return dataclasses.replace(self, **changes)


REGISTRY: dict[str, type[Format]] = {}
