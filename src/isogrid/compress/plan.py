"""Which member of which format each layer gets: the budget, spread over the layers before anything is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isogrid.compress.allocate import (
    Option,
    allocate_uniform,
    choose,
    lagrangian_bound,
    water_fill,
)
from isogrid.compress.calibrate import Moments, evaluation_mode
from isogrid.compress.curves import Curves
from isogrid.compress.layerwise import InOrder, Seen, fit_in_order
from isogrid.compress.sensitivity import loss_weights
from isogrid.compress.welore import allocate_welore
from isogrid.errors import IsogridError
from isogrid.fitting import Metric
from isogrid.formats import Budget, Format

# A global allocation leaves every layer this share of what a uniform one would give it.
LEAST_SHARE = 0.3
SENSITIVITY_ROWS = 8
ALLOCATIONS = ("uniform", "global", "water_filling", "welore")


@dataclass(frozen=True)
class Plan:
    """What each layer gets.

    Attributes:
        members: by layer.
        rise: predicted rise of the model's loss, by sensitivity times squared error; None where it was not measured.
        bound: no choice within the budget has a smaller predicted rise (a Lagrangian bound); None likewise.
    """

    members: dict[str, Format]
    rise: float | None = None
    bound: float | None = None


def plan(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    formats: Sequence[Format],
    budget: Budget,
    share: float,
    *,
    allocate: str = "uniform",
    calibration: list[Any] | Moments | None = None,
    seed: int = 0,
) -> Plan:
    """Spread a budget over layers.

    Args:
        model: the dense model.
        layers: name to layer.
        formats: what may be chosen from; sizes open.
        budget: over all layers together.
        share: the same as a fraction of what the dense matrices cost.
        allocate: one of `ALLOCATIONS`.
        calibration: batches; moments do where only errors are asked for; None for what needs no data.
        seed: of the labels that sensitivities are measured with.

    Raises:
        IsogridError: an allocation that is unknown, or has no data, or doesn't suit the formats.
        BudgetError: nothing is that small.
    """
    check_allocation(allocate, formats, calibration)
    if allocate == "welore":
        return Plan(allocate_welore(layers, formats[0], budget))
    if allocate == "uniform" and len(formats) == 1:
        return Plan(allocate_uniform(layers, formats[0], share, budget))
    # Water-filling asks for nothing but errors; the dense option and a least size are not its own.
    least = 0.0 if allocate == "water_filling" else LEAST_SHARE * share
    curves = _curves(model, layers, formats, calibration, least, budget)
    options = {name: curves.of(name) for name in layers}
    if allocate == "uniform":
        return Plan({name: _best_within(of, share) for name, of in options.items()})
    if allocate == "water_filling":
        low = {name: [one for one in of if one.format.name == formats[0].name] for name, of in options.items()}
        return Plan({name: one.format for name, one in water_fill(low, budget.limit).items()})
    assert isinstance(calibration, list)
    weights = loss_weights(model, layers, few(calibration), seed=seed)
    options = {
        name: [dataclasses.replace(one, error=one.error * weights[name]) for one in of] for name, of in options.items()
    }
    chosen = choose(options, budget.limit)
    return Plan(
        {name: one.format for name, one in chosen.items()},
        rise=sum(one.error for one in chosen.values()),
        bound=lagrangian_bound(options, budget.limit),
    )


def check_allocation(allocate: str, formats: Sequence[Format], calibration: Any) -> None:
    """Raise IsogridError where the request can't be met, before any work."""
    if allocate not in ALLOCATIONS:
        raise IsogridError(f"allocate is one of {', '.join(ALLOCATIONS)}; got {allocate!r}")
    if allocate == "global" and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError("allocate='global' measures the model on data: give calibration batches or texts")
    if allocate in ("welore", "water_filling") and len(formats) != 1:
        raise IsogridError(f"allocate={allocate!r} chooses ranks of one format; give one, or allocate='global'")
    if allocate == "water_filling" and formats[0].name not in ("low_rank", "low_rank_light"):
        raise IsogridError(f"water filling chooses ranks of low_rank or low_rank_light, got {formats[0].label()}")


def _curves(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    formats: Sequence[Format],
    calibration: list[Any] | Moments | None,
    least: float,
    budget: Budget,
) -> Curves:
    curves = Curves(layers, formats, least, budget)
    seen: set[str] = set()

    def probe(name: str, metric: Metric, _: Seen) -> nn.Module:
        module = layers[name]
        curves.visit(name, metric.centred if getattr(module, "bias", None) is not None else metric)
        seen.add(name)
        return module

    if isinstance(calibration, Moments):
        for name in layers:
            if name in calibration.metrics:
                probe(name, calibration.metrics[name].fresh(), None)  # type: ignore[arg-type]
    elif calibration is not None:
        with evaluation_mode(model):
            fit_in_order(model, layers, calibration, InOrder(probe, calibration, anchored=False), anchored=False)
    for name in layers:
        if name not in seen:
            curves.visit(name, None)
    return curves


def _best_within(options: Sequence[Option], share: float) -> Format:
    limit = share * options[-1].cost * (1 + 1e-12)
    return min((one for one in options if one.cost <= limit), key=lambda one: one.error, default=options[0]).format


def few(batches: list[Any]) -> list[Any]:
    """Eight windows one by one: gradients of whole batches would hold all their activations at once."""
    single = [row for batch in batches[:SENSITIVITY_ROWS] if isinstance(batch, Tensor) for row in batch.split(1)]
    return (single or batches)[:SENSITIVITY_ROWS]
