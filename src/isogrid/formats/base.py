"""What a matrix can be: the one interface that formats implement and every job is written against."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import FitReport, Metric, OnStep, alternating_least_squares, descend, squared_norm, widened

Role = Literal["weight", "gain", "structure", "index", "code"]
TRAINABLE: frozenset[str] = frozenset({"weight", "gain", "structure"})
Factors = dict[str, Tensor]
T = TypeVar("T")
# A matrix of so few entries gets this many random starts in a fit by the general solver: it takes seconds.
SMALL, SMALL_RESTARTS = 2048, 20


@dataclass(frozen=True)
class Factor:
    """What one tensor of a format is.

    Attributes:
        shape: its sizes.
        dtype: None for the layer's floating dtype; an integer dtype for indices and codes.
        role: "weight", "gain" and "structure" are trained (the last two without decay); "index" and "code" are
            buffers that ``.to(dtype)`` leaves alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    role: Role = "weight"

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def trainable(self) -> bool:
        """Whether it becomes a parameter."""
        return self.role in TRAINABLE


@dataclass(frozen=True)
class Component:
    """One dense stage of a product: what initialisation and learning rates need to know (Qiu et al. 2024, section 3).

    Attributes:
        factor: name of the factor that holds it.
        fan_in: inputs of one of its blocks.
        fan_out: outputs of one of its blocks.
        outputs: outputs of all its blocks together.
    """

    factor: str
    fan_in: int
    fan_out: int
    outputs: int


@dataclass(frozen=True)
class Traits:
    """What a format's own fit guarantees; every declared trait is proven by the test suite.

    Attributes:
        exact_on_members: the fit of a matrix inside the format is that matrix.
        optimal: without a metric the fit is the global minimum.
        optimal_under_metric: with any metric the fit is the global minimum.
        monotone_in_budget: a larger budget never gives a larger error.
        linear_in_factors: the matrix is linear in each weight factor alone.
    """

    exact_on_members: bool = False
    optimal: bool = False
    optimal_under_metric: bool = False
    monotone_in_budget: bool = False
    linear_in_factors: bool = False


@dataclass(frozen=True)
class Cost:
    """What a matrix in a format costs. Costs add.

    Attributes:
        parameters: trained numbers.
        multiply_adds: per row of input.
        bits: everything stored, codes, indices and scales included.
    """

    parameters: int
    multiply_adds: int
    bits: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters, self.multiply_adds + other.multiply_adds, self.bits + other.bits
        )

    @property
    def bytes(self) -> int:
        """Stored bytes, rounded up."""
        return -(-self.bits // 8)


@dataclass(frozen=True)
class Budget:
    """How much one matrix may cost: parameters or bytes, exactly one of them.

    Attributes:
        parameters: most trained numbers.
        bytes: most stored bytes, for factors of ``dtype``.
        dtype: floating dtype the bytes are counted for.
    """

    parameters: int | None = None
    bytes: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        given = [limit for limit in (self.parameters, self.bytes) if limit is not None]
        if len(given) != 1:
            raise IsogridError("a budget is in parameters or in bytes: give exactly one of them")
        if given[0] < 0:
            raise IsogridError(f"a budget is not negative, got {given[0]}")

    @classmethod
    def keep(cls, fraction: float, out_features: int, in_features: int) -> Budget:
        """The budget of a fraction in (0, 1] of the dense matrix's parameters, rounded down."""
        if not 0 < fraction <= 1:
            raise IsogridError(f"keep is a fraction of the dense parameters in (0, 1], got {fraction}")
        # 0.1 · 70 is 7.000000000000001 in binary: a hair of slack keeps exact fractions exact, both ways.
        return cls(parameters=math.floor(fraction * out_features * in_features * (1 + 1e-12)))

    def allows(self, cost: Cost) -> bool:
        """Whether a cost stays within the budget."""
        return self.amount(cost) <= self.limit

    def amount(self, cost: Cost) -> int:
        """The part of a cost that this budget counts."""
        return cost.parameters if self.parameters is not None else cost.bytes

    @property
    def limit(self) -> int:
        """Most parameters or bytes, whichever the budget is in."""
        limit = self.parameters if self.parameters is not None else self.bytes
        assert limit is not None
        return limit

    def with_limit(self, limit: int) -> Budget:
        """A budget in the same unit and dtype; a limit below zero counts as zero."""
        unit = "parameters" if self.parameters is not None else "bytes"
        return Budget(**{unit: max(limit, 0)}, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.parameters} parameters" if self.parameters is not None else f"{self.bytes} bytes"


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
        stages = {component.factor: component for component in self.components(out_features, in_features)}
        for name, factor in self.factors(out_features, in_features).items():
            value = factors[name]
            if factor.role == "index":
                value.copy_(torch.arange(value.numel(), device=value.device).view(value.shape))
            elif factor.role == "gain":
                value.fill_(1)
            elif factor.role == "weight":
                stage = stages.get(name)
                fan_in, fan_out = (stage.fan_in, stage.fan_out) if stage else (factor.numel, factor.numel)
                std = math.sqrt(max(min(fan_in, fan_out), 1)) / max(fan_in, 1)
                normal_(value, std, generator)
            else:
                value.zero_()

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

    def error_curve(self, target: Tensor, metric: Metric | None) -> list[float] | None:
        """Objectives of the fits of sizes 1, 2, … up to `size_limit`, float64; None where each size needs a fit."""
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
        if target.ndim != 2 or not target.is_floating_point():
            raise IsogridError(f"a target is a floating matrix (out, in), got {target.dtype} {tuple(target.shape)}")
        if not torch.isfinite(target).all():
            count = int((~torch.isfinite(target)).sum())
            raise IsogridError(f"the target has {count} NaN or infinite entries; repair the weight before fitting it")
        if metric is not None and metric.in_features != target.shape[1]:
            raise IsogridError(f"the metric is over {metric.in_features} inputs, the target has {target.shape[1]}")
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        known = _solver_options(self)
        if unknown := sorted(options.keys() - known):
            has = ", ".join(sorted(known)) or "none"
            raise IsogridError(f"{self.name}: its fit has no option {unknown[0]!r}; options: {has}")
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
                found = Format.solve(
                    self,
                    wide,
                    on_device,
                    solver="default",
                    start=own,
                    generator=generator,
                    on_step=on_step,
                    restarts=SMALL_RESTARTS if wide.numel() <= SMALL else 0,
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
        Solvers: default, or one half of it: "alternating" (needs linearity) or "descent".

        An override names its options as keyword parameters; `fit` refuses all others.
        """
        linear = self.traits.linear_in_factors
        require_solver(self, solver, ("default", "descent", "alternating") if linear else ("default", "descent"))
        out_features, in_features = target.shape
        specs = self.factors(out_features, in_features)
        trainable = [name for name, spec in specs.items() if spec.trainable]
        if restarts is None:
            restarts = int(start is None)

        def random_start() -> Factors:
            begin = new_factors(self, out_features, in_features, dtype=torch.float64, device=target.device)
            self.initialize(begin, out_features, in_features, generator)
            _scale_to(self, begin, target)
            return begin

        def product(factors: Factors, x: Tensor) -> Tensor:
            return self.multiply(factors, x, out_features)

        def improved(found: Factors, share: int, tell: OnStep | None) -> tuple[float, Factors]:
            if linear and solver != "descent":
                most = min(rounds, max(rounds // share, 2))
                found = alternating_least_squares(product, found, trainable, target, metric, rounds=most)
            if solver != "alternating":
                most = min(steps, max(steps // share, 20))
                found = descend(product, found, set(trainable), target, metric, steps=most, on_step=tell)
            return squared_norm(target - self.dense(found, out_features, in_features), metric), found

        starts = [] if start is None else [start]
        starts += [random_start() for _ in range(max(restarts, 0 if starts else 1))]
        if len(starts) > 1:
            trials = sorted((improved(begin, 10, None) for begin in starts), key=lambda trial: trial[0])
            starts = [found for _, found in trials[: -(-len(trials) // 4)]]
        return min((improved(begin, 1, on_step) for begin in starts), key=lambda trial: trial[0])[1]

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
        stages = {stage.factor: stage for stage in self.components(out_features, in_features)}
        specs = self.factors(out_features, in_features)
        weights = [name for name, spec in specs.items() if spec.role == "weight" and spec.numel]
        for name in weights:
            sides = {} if name not in stages else {stages[name].fan_in, stages[name].fan_out}
            # More axes may end in sides of the right lengths that are not those of the block.
            if set(specs[name].shape[-2:]) != sides or len(specs[name].shape) not in (2, 3):
                raise IsogridError(
                    f"{self.label()}: factor {name!r} of shape {specs[name].shape} is no stack of blocks, so it has no "
                    "orthonormal start; take the default start"
                )
        for name in weights:
            orthonormalize_(factors[name])

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
            raise BudgetError(self._too_small(out_features, in_features, budget, cost))
        low, high = 1, max(self.size_limit(out_features, in_features), 1)
        smallest = self.with_size(low)
        cost = smallest.cost(out_features, in_features, budget.dtype)
        if not budget.allows(cost):
            raise BudgetError(self._too_small(out_features, in_features, budget, cost))
        while low < high:  # cost grows with the size: bisection
            middle = (low + high + 1) // 2
            if budget.allows(self.with_size(middle).cost(out_features, in_features, budget.dtype)):
                low = middle
            else:
                high = middle - 1
        return self.with_size(low)

    def candidates(self, out_features: int, in_features: int, budget: Budget) -> Iterable[Self]:
        """What an automatic choice may try within a budget. Default: the one `sized` member, if there is one."""
        try:
            yield self.sized(out_features, in_features, budget)
        except BudgetError:
            return

    # ---- spelling ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description, read back by `spelling.format_from_dict`."""
        return {"name": self.name} | {f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def label(self) -> str:
        """Short name for tables, read back by `spelling.as_format`: ``monarch(blocks=4, rank=36)``.

        Choices left at their default are left out, except numbers: a rank or a number of blocks is always shown.
        """
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if value != default or type(value) in (int, float):
                parts.append(f"{f.name}={_label(value)}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name

    def with_size(self, size: int) -> Self:
        """The member with another value of ``size_field``."""
        assert self.size_field is not None
        changes: dict[str, Any] = {self.size_field: size}
        return dataclasses.replace(self, **changes)

    def _too_small(self, out_features: int, in_features: int, budget: Budget, cost: Cost) -> str:
        share = cost.parameters / (out_features * in_features)
        if share >= 1:
            return (
                f"{self.label()}: its smallest {out_features} x {in_features} member takes {budget.amount(cost)}, the "
                f"budget is {budget}; it is no smaller than dense here, choose other hyper-parameters or another format"
            )
        return (
            f"{self.label()}: the smallest {out_features} x {in_features} member takes {budget.amount(cost)}, "
            f"the budget is {budget}; keep at least {math.ceil(share * 1000) / 1000:g} of it, or choose another format"
        )


REGISTRY: dict[str, type[Format]] = {}


# ---- factors -------------------------------------------------------------------------------------------------------


def new_factors(
    fmt: Format,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Factors:
    """Uninitialised tensors for all factors of an ``(out, in)`` matrix."""
    return {
        name: torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
        for name, spec in fmt.factors(out_features, in_features).items()
    }


def check_factors(fmt: Format, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
    """Raise IsogridError unless the factors have the format's names and shapes for these sizes."""
    specs = fmt.factors(out_features, in_features)
    if factors.keys() != specs.keys():
        raise IsogridError(f"{fmt.label()}: factors are {sorted(specs)}, got {sorted(factors)}")
    for name, spec in specs.items():
        if tuple(factors[name].shape) != spec.shape:
            raise IsogridError(
                f"{fmt.label()}: factor {name!r} of a {out_features} x {in_features} matrix has shape {spec.shape}, "
                f"got {tuple(factors[name].shape)}"
            )


def prefixed(prefix: str, factors: Mapping[str, T]) -> dict[str, T]:
    """Factors of a part under the names they have in the whole."""
    return {prefix + name: value for name, value in factors.items()}


def unprefixed(prefix: str, factors: Mapping[str, T]) -> dict[str, T]:
    """The factors of one part, under the names the part knows."""
    return {name.removeprefix(prefix): value for name, value in factors.items() if name.startswith(prefix)}


def require_solver(fmt: Format, solver: str, known: Sequence[str]) -> None:
    """Raise IsogridError unless the solver is one of the known."""
    if solver not in known:
        raise IsogridError(f"{fmt.name} has no solver {solver!r}; it has: {', '.join(known)}")


def require_rank(fmt: Format, rank: int | None, limit: int | None = None) -> int:
    """A given rank; raises IsogridError when it is missing, below 1 or above the limit."""
    if rank is None:
        raise IsogridError(f"{fmt.name} has no rank yet: give rank=… or call .sized(out, in, budget)")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or (limit is not None and rank > limit):
        raise IsogridError(f"{fmt.name}: rank {rank} is not in 1 … {limit if limit is not None else '∞'}")
    return rank


def balanced_norms(factors: Factors) -> Factors:
    """Factors of a product scaled to equal Frobenius norms; the product is unchanged."""
    norms = [float(value.norm()) for value in factors.values()]
    if min(norms) == 0:
        return factors
    mean = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return {name: value * (mean / norm) for (name, value), norm in zip(factors.items(), norms, strict=True)}


def normal_(value: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with Gaussian numbers drawn in float32 where the generator lives: same seed, same numbers on any device."""
    device = generator.device if generator is not None else "cpu"
    drawn = torch.randn(value.shape, generator=generator, device=device, dtype=torch.float32)
    value.copy_(drawn * std)


def orthonormalize_(blocks: Tensor) -> None:
    """Each matrix of a stack ``(…, rows, columns)`` becomes its polar factor, in place; solved in float64."""
    u, _, vh = torch.linalg.svd(widened(blocks), full_matrices=False)
    blocks.copy_(u @ vh)


def _solver_options(fmt: Format) -> set[str]:
    """Names of the options that a format's `solve` takes, and those of a format within it."""
    given = {"target", "metric", "solver", "start", "generator", "on_step"}
    named = {
        name
        for name, parameter in inspect.signature(fmt.solve).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    inner = getattr(fmt, "inner", None)
    return (named - given) | (_solver_options(inner) if isinstance(inner, Format) else set())


def _scale_to(fmt: Format, factors: Factors, target: Tensor) -> None:
    """Scale the first weight factor so that the matrix has the target's norm: descent then starts at the right size."""
    specs = fmt.factors(*target.shape)
    norm = fmt.dense(factors, *target.shape).norm()
    weights = [name for name, spec in specs.items() if spec.role == "weight"]
    if weights and target.norm() == 0:
        factors[weights[-1]] = torch.zeros_like(factors[weights[-1]])
    elif weights and norm > 0:
        factor = (target.norm() / norm) ** (1 / len(weights))
        for name in weights:
            factors[name] = factors[name] * factor


def _to_json(value: Any) -> Any:
    if isinstance(value, Format):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    return value


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_label(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return value.label() if isinstance(value, Format) else str(value)


__all__ = [
    "Budget",
    "Component",
    "Cost",
    "Factor",
    "Factors",
    "Format",
    "Traits",
    "balanced_norms",
    "check_factors",
    "new_factors",
    "normal_",
    "orthonormalize_",
    "prefixed",
    "require_rank",
    "require_solver",
    "unprefixed",
]
