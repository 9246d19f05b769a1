"""How much each layer may keep: the same share for all, or one budget spent where the model is most sensitive."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from isogrid.compress.prices import Prices, StoredPrices
from isogrid.errors import BudgetError, IsogridError
from isogrid.formats import Format

# Costs are rounded up to this part of the budget in the exact choice; what that leaves over is spent afterwards.
RESOLUTION = 50_000


@dataclass(frozen=True)
class Option:
    """One way to write a layer's matrix.

    Attributes:
        format: the member.
        cost: its parameters, bytes or nanoseconds.
        error: what it adds to the model's loss, in one unit for all layers.
    """

    format: Format
    cost: int
    error: float


class Priced(Protocol):
    """What can be chosen: something with a cost and an error, such as `Option`."""

    @property
    def cost(self) -> int:
        """In whatever unit the budget has."""

    @property
    def error(self) -> float:
        """What it adds to the sum that is to be small."""


P = TypeVar("P", bound=Priced)


def allocate_uniform(
    layers: Mapping[str, nn.Module], fmt: Format, keep: float, prices: Prices | None = None
) -> dict[str, Format]:
    """Every layer the same fraction of its dense cost: the format's largest member within it.

    Args:
        layers: name to dense layer.
        fmt: its size open.
        keep: fraction in (0, 1).
        prices: what costs are counted in; None: parameters.

    Raises:
        IsogridError: keep outside (0, 1).
        BudgetError: a layer has no member that small; names the layer.
    """
    check_keep(keep)
    prices = prices or StoredPrices(layers)
    return {name: prices.within(name, fmt, prices.share_of(name, keep)) for name in layers}


def water_fill(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Ranks raised one by one where the error falls most per cost, until the budget is spent (fitting theory 5.2).

    Optimal up to one step where curves are convex, as spectra's tails are.

    Args:
        options: by layer; of those that cost more and lose no less than another, none is taken.
        budget: of all costs together.

    Raises:
        BudgetError: the cheapest options together are above the budget.
    """
    options = {name: _worth(of) for name, of in options.items()}
    place = dict.fromkeys(options, 0)
    left = budget - sum(of[0].cost for of in options.values())
    if left < 0:
        raise BudgetError(f"the smallest members of all layers take {budget - left}, the budget is {budget}; keep more")

    def gain(name: str) -> float:
        now, then = options[name][place[name]], options[name][place[name] + 1]
        return (now.error - then.error) / max(then.cost - now.cost, 1)

    heap = [(-gain(name), name) for name, of in options.items() if len(of) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        step = options[name][place[name] + 1].cost - options[name][place[name]].cost
        if step > left:
            continue
        left -= step
        place[name] += 1
        if place[name] + 1 < len(options[name]):
            heapq.heappush(heap, (-gain(name), name))
    return {name: of[place[name]] for name, of in options.items()}


def _worth(options: Sequence[Option]) -> list[Option]:
    """By rising cost, each of a smaller error than those before: measured times don't always rise with the size."""
    found: list[Option] = []
    for one in sorted(options, key=lambda one: (one.cost, one.error)):
        if not found or one.error < found[-1].error:
            found.append(one)
    return found


def lagrangian_bound(options: Mapping[str, Sequence[Option]], budget: int) -> float:
    """A sum of errors that no choice within the budget falls below: ``max_p sum_l min(e + p c) - p B``."""
    low, high = 0.0, 1.0
    curves = [
        tuple(
            torch.tensor(values, dtype=torch.float64) for values in zip(*[(o.cost, o.error) for o in of], strict=True)
        )
        for of in options.values()
    ]

    def at(price: float) -> tuple[float, float]:
        value, spent = -price * budget, 0.0
        for costs, errors in curves:
            index = int((errors + price * costs).argmin())
            value += float(errors[index] + price * costs[index])
            spent += float(costs[index])
        return value, spent

    best = max(at(0.0)[0], 0.0)
    while at(high)[1] > budget and high < 1e300:
        high *= 4
    for _ in range(200):
        middle = (low + high) / 2
        value, spent = at(middle)
        best = max(best, value)
        low, high = (middle, high) if spent > budget else (low, middle)
    return best


def choose(options: Mapping[str, Sequence[P]], budget: int) -> dict[str, P]:
    """One option a layer, costs within the budget, errors with the least sum: a multiple-choice knapsack.

    Exact up to the rounding of costs, by dynamic programming (fitting theory 5.2); the rest that rounding leaves goes
    to the upgrades that lower the error most.

    Raises:
        BudgetError: the cheapest options together are above the budget.
    """
    cheapest = sum(min(option.cost for option in of) for of in options.values())
    if cheapest > budget:
        raise BudgetError(f"the smallest members of all layers take {cheapest}, the budget is {budget}; keep more")
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
    if not math.isfinite(float(best[-1])):
        raise IsogridError("the errors of the options are not finite; no choice is the best")
    chosen: dict[str, P] = {}
    left = size - 1
    for name, pick in zip(reversed(list(options)), reversed(picks), strict=True):
        option = options[name][int(pick[left])]
        chosen[name] = option
        left -= -(-option.cost // unit)
    _spend_rest(chosen, options, budget)
    return {name: chosen[name] for name in options}


def _spend_rest(chosen: dict[str, P], options: Mapping[str, Sequence[P]], budget: int) -> None:
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


def check_keep(keep: float) -> None:
    """Raise IsogridError unless keep is a fraction in (0, 1)."""
    if not isinstance(keep, int | float) or not 0 < keep < 1:
        raise IsogridError(f"keep is a fraction of the selected dense parameters between 0 and 1, got {keep!r}")


def refuse_explicit_sizes(fmt: Format) -> None:
    """A size that keep would override is a contradiction, and a label that names it would be untrue."""
    chosen = fmt.size_field or fmt.open_field
    for field in dataclasses.fields(fmt):
        value = getattr(fmt, field.name)
        if field.name == chosen and value != field.default:
            raise IsogridError(f"{fmt.label()}: keep chooses the {field.name}; leave {field.name}={value} out")
    for part in fmt.sized_parts():
        refuse_explicit_sizes(part)
