"""What a format refuses: targets, factors, solvers, options, ranks and budgets that don't suit it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric

if TYPE_CHECKING:
    from isogrid.formats.base import Format
    from isogrid.formats.budget import Budget, Cost


def check_target(target: Tensor, metric: Metric | None) -> None:
    """Raise IsogridError unless the target is a finite floating matrix and the metric is over its inputs."""
    if target.ndim != 2 or not target.is_floating_point():
        raise IsogridError(f"a target is a floating matrix (out, in), got {target.dtype} {tuple(target.shape)}")
    # A sum is finite only if all its terms are, and quicker; one that overflows is looked into.
    if not torch.isfinite(target.sum()) and not torch.isfinite(target).all():
        count = int((~torch.isfinite(target)).sum())
        raise IsogridError(f"the target has {count} NaN or infinite entries; repair the weight before fitting it")
    if metric is not None and metric.in_features != target.shape[1]:
        raise IsogridError(f"the metric is over {metric.in_features} inputs, the target has {target.shape[1]}")


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


def check_options(fmt: Format, options: Iterable[str]) -> None:
    """Raise IsogridError unless the format's fit has options of these names."""
    known = solver_options(fmt)
    if unknown := sorted(set(options) - known):
        has = ", ".join(sorted(known)) or "none"
        raise IsogridError(f"{fmt.name}: its fit has no option {unknown[0]!r}; options: {has}")


def solver_options(fmt: Format) -> set[str]:
    """Names of the options that a format's `solve` takes, and those of a format within it."""
    given = {"target", "metric", "solver", "start", "generator", "on_step"}
    named = {
        name
        for name, parameter in inspect.signature(fmt.solve).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    inner: Any = getattr(fmt, "inner", None)
    return (named - given) | (solver_options(inner) if hasattr(inner, "solve") else set())


def require_solver(fmt: Format, solver: str, known: Sequence[str]) -> None:
    """Raise IsogridError unless the solver is one of the known."""
    if solver not in known:
        raise IsogridError(f"{fmt.name} has no solver {solver!r}; it has: {', '.join(known)}")


def require_rank(fmt: Format, rank: int | None, limit: int | None = None) -> int:
    """A given rank, or size of another name; raises IsogridError when it is missing, below 1 or above the limit."""
    what = fmt.size_field or "rank"
    if rank is None:
        raise IsogridError(f"{fmt.name} has no {what} yet: give {what}=… or call .sized(out, in, budget)")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or (limit is not None and rank > limit):
        raise IsogridError(f"{fmt.name}: {what} {rank} is not in 1 … {limit if limit is not None else '∞'}")
    return rank


def too_small(fmt: Format, out_features: int, in_features: int, budget: Budget, cost: Cost) -> BudgetError:
    """The error to raise where even a format's smallest member, of this cost, is beyond a budget."""
    share = cost.parameters / (out_features * in_features)
    if share >= 1:
        return BudgetError(
            f"{fmt.label()}: its smallest {out_features} x {in_features} member takes {budget.amount(cost)}, the "
            f"budget is {budget}; it is no smaller than dense here, choose other hyper-parameters or another format"
        )
    return BudgetError(
        f"{fmt.label()}: the smallest {out_features} x {in_features} member takes {budget.amount(cost)}, "
        f"the budget is {budget}; keep at least {math.ceil(share * 1000) / 1000:g} of it, or choose another format"
    )
