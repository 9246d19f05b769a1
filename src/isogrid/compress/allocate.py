"""How much each layer may keep: the same share for all, or one budget spent where the model is most sensitive."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric, squared_norm, widened
from isogrid.formats import Budget, Dense, Format
from isogrid.linear import linear_matrix

# Costs are rounded up to this part of the budget in the exact choice; what that leaves over is spent afterwards.
RESOLUTION = 50_000
# Sizes at which a format without a closed error curve is fitted, as shares of the dense parameters.
PROBES = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Option:
    """One way to write a layer's matrix.

    Attributes:
        format: the member.
        cost: its parameters.
        error: what it adds to the model's loss, in one unit for all layers.
    """

    format: Format
    cost: int
    error: float


def allocate_uniform(layers: Mapping[str, nn.Module], fmt: Format, keep: float) -> dict[str, Format]:
    """Every layer the same fraction of its dense parameters: the format's largest member within it.

    Raises:
        IsogridError: keep outside (0, 1).
        BudgetError: a layer has no member that small; names the layer.
    """
    _check_keep(keep)
    _refuse_explicit_sizes(fmt)
    sized: dict[str, Format] = {}
    for name, module in layers.items():
        out_features, in_features = linear_matrix(module).shape
        try:
            sized[name] = fmt.sized(out_features, in_features, Budget.keep(keep, out_features, in_features))
        except BudgetError as error:
            raise BudgetError(f"layer {name!r}: {error}; or skip the layer") from None
    return sized


def allocate_global(
    curves: Mapping[str, Sequence[Option]], weights: Mapping[str, float], keep: float
) -> dict[str, Format]:
    """One budget over all layers: the members, dense among them, whose weighted errors sum to the least.

    Args:
        curves: by layer, its `error_curve`; the last option is the dense matrix.
        weights: what a unit of squared output error costs the loss, by layer (`loss_weights`).
        keep: fraction of all dense parameters together.

    Raises:
        BudgetError: the smallest members together are above the budget.
    """
    options = {
        name: [dataclasses.replace(one, error=one.error * weights[name]) for one in curve]
        for name, curve in curves.items()
    }
    whole = sum(curve[-1].cost for curve in curves.values())
    chosen = choose(options, math.floor(keep * whole * (1 + 1e-12)))
    return {name: option.format for name, option in chosen.items()}


def error_curve(fmt: Format, matrix: Tensor, metric: Metric | None, least: int = 0) -> list[Option]:
    """Members of a format with their squared errors ``||(W - V) M^½||²``, and the dense matrix with none.

    Closed formats tell all their errors at once; others are fitted at a few sizes, and sizes between them get errors
    interpolated in the logarithm.

    Args:
        fmt: the format, its size open.
        matrix: ``(out, in)``.
        metric: of the inputs.
        least: no member below this many parameters, if there is one: errors of very small members are beyond what
            a quadratic loss can tell (fitting theory 5.3).

    Returns:
        By rising cost, the dense matrix last.
    """
    out_features, in_features = matrix.shape
    dense = Option(Dense(), matrix.numel(), 0.0)
    spectrum = fmt.error_curve(widened(matrix), metric)
    found: list[Option] = []
    if spectrum is not None:
        # Neighbouring ranks tell the choice nothing that their neighbours don't: at most 128 of a layer.
        step = -(-len(spectrum) // 128)
        for size in range(step, len(spectrum) + 1, step):
            member = fmt.with_size(size)
            cost = member.cost(out_features, in_features).parameters
            found.append(Option(member, cost, spectrum[size - 1]))
    else:
        seen: set[Format] = set()
        for share in PROBES:
            try:
                member = fmt.sized(out_features, in_features, Budget.keep(share, out_features, in_features))
            except BudgetError:
                continue
            if member in seen:
                continue
            seen.add(member)
            factors = member.fit(matrix, metric)
            error = squared_norm(widened(matrix) - widened(member.dense(factors, out_features, in_features)), metric)
            found.append(Option(member, member.cost(out_features, in_features).parameters, error))
        found = _between(fmt, found, out_features, in_features)
    smaller = [one for one in found if one.cost < dense.cost]
    allowed = [one for one in smaller if one.cost >= least] or smaller[-1:]
    return [*allowed, dense]


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option a layer, costs within the budget, errors with the least sum: a multiple-choice knapsack.

    Exact up to the rounding of costs, by dynamic programming (fitting theory 5.2); the rest that rounding leaves goes
    to the upgrades that lower the error most.

    Raises:
        BudgetError: the cheapest options together are above the budget.
    """
    cheapest = sum(min(option.cost for option in of) for of in options.values())
    if cheapest > budget:
        raise BudgetError(f"the smallest members of all layers take {cheapest} parameters, the budget is {budget}")
    unit = max(1, budget // RESOLUTION)
    # Rounding up may push even the cheapest choice over the budget: then the unit has to be finer.
    while unit > 1 and sum(min(-(-option.cost // unit) for option in of) for of in options.values()) > budget // unit:
        unit = max(1, unit // 2)
    size = budget // unit + 1
    best = torch.zeros(size, dtype=torch.float64)
    picks: list[Tensor] = []
    for of in options.values():
        now = torch.full((size,), math.inf, dtype=torch.float64)
        pick = torch.zeros(size, dtype=torch.int16)
        for index, option in enumerate(of):
            cost = -(-option.cost // unit)
            if cost >= size:
                continue
            reached = best[: size - cost] + option.error
            better = reached < now[cost:]
            now[cost:] = torch.where(better, reached, now[cost:])
            pick[cost:] = torch.where(better, torch.tensor(index, dtype=torch.int16), pick[cost:])
        best = now
        picks.append(pick)
    chosen: dict[str, Option] = {}
    left = size - 1
    for name, pick in zip(reversed(list(options)), reversed(picks), strict=True):
        option = options[name][int(pick[left])]
        chosen[name] = option
        left -= -(-option.cost // unit)
    _spend_rest(chosen, options, budget)
    return {name: chosen[name] for name in options}


def _spend_rest(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], budget: int) -> None:
    """Upgrade layers, the largest gain per parameter first, as long as the budget allows one."""
    left = budget - sum(option.cost for option in chosen.values())
    while True:
        upgrades = [
            ((chosen[name].error - option.error) / max(option.cost - chosen[name].cost, 1), name, option)
            for name, of in options.items()
            for option in of
            if option.cost - chosen[name].cost <= left and option.error < chosen[name].error
        ]
        if not upgrades:
            return
        _, name, option = max(upgrades, key=lambda upgrade: upgrade[0])
        left -= option.cost - chosen[name].cost
        chosen[name] = option


def _between(fmt: Format, probed: list[Option], out_features: int, in_features: int) -> list[Option]:
    """Members of sizes between the probed ones, errors interpolated in the logarithm over the cost."""
    found = {one.cost: one for one in probed}
    for low, high in itertools.pairwise(probed):
        for part in (0.25, 0.5, 0.75):
            limit = round(low.cost + part * (high.cost - low.cost))
            try:
                member = fmt.sized(out_features, in_features, Budget(parameters=limit))
            except BudgetError:
                continue
            cost = member.cost(out_features, in_features).parameters
            if cost in found or not low.cost < cost < high.cost:
                continue
            place = (cost - low.cost) / (high.cost - low.cost)
            floor = 1e-12 * max(low.error, 1e-300)
            logarithm = (1 - place) * math.log(max(low.error, floor)) + place * math.log(max(high.error, floor))
            found[cost] = Option(member, cost, math.exp(logarithm))
    return sorted(found.values(), key=lambda one: one.cost)


def _check_keep(keep: float) -> None:
    if not isinstance(keep, int | float) or not 0 < keep < 1:
        raise IsogridError(f"keep is a fraction of the selected dense parameters between 0 and 1, got {keep!r}")


def _refuse_explicit_sizes(fmt: Format) -> None:
    """A size that keep would override is a contradiction, and a label that names it would be untrue."""
    for field in dataclasses.fields(fmt):
        value = getattr(fmt, field.name)
        if field.name == fmt.size_field and value != field.default:
            raise IsogridError(f"{fmt.label()}: keep chooses the {field.name}; leave {field.name}={value} out")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Format):
                _refuse_explicit_sizes(part)
