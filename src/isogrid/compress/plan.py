"""Which member of which format each layer gets: the budget, spread over the layers before anything is fitted."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
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
from isogrid.compress.prices import Prices, StoredPrices
from isogrid.compress.sensitivity import loss_weights
from isogrid.compress.welore import allocate_welore, chooses_ranks
from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric
from isogrid.formats import Budget, Format, as_format

# A global allocation leaves every layer this share of what a uniform one would give it.
LEAST_SHARE = 0.3
SENSITIVITY_ROWS = 8
SENSITIVITY_TOKENS = 256
MOST_ROWS = SENSITIVITY_ROWS * SENSITIVITY_TOKENS
Visit = Callable[[str, Metric | None], None]
ALLOCATIONS = ("uniform", "global", "water_filling", "welore")


@dataclass(frozen=True)
class Plan:
    """What each layer gets.

    Attributes:
        members: by layer.
        formats: what was chosen from.
        allocation: how.
        rise: predicted rise of the model's loss, by sensitivity times squared error; None where it was not measured.
        bound: no choice within the budget has a smaller predicted rise (a Lagrangian bound); None likewise.
        milliseconds: predicted time of a pass, where the budget is in time.
    """

    members: dict[str, Format]
    formats: tuple[Format, ...] = ()
    allocation: str = "uniform"
    rise: float | None = None
    bound: float | None = None
    milliseconds: float | None = None

    def spent(self, layers: Mapping[str, nn.Module], unit: Budget | None = None) -> tuple[Budget, float]:
        """What the members cost together, in a budget's unit, and the share of the dense cost that it is.

        Args:
            layers: name to dense layer.
            unit: a budget, for its unit; None: parameters.

        Raises:
            IsogridError: the plan is not of these layers; names the first that is amiss.
        """
        for name in [*layers, *self.members]:
            if name not in self.members or name not in layers:
                why = "the plan doesn't know it" if name in layers else "it is planned, but not selected"
                raise IsogridError(f"layer {name!r}: {why}; a plan is for one model and one selection of its layers")
        prices = StoredPrices(layers, unit)
        cost = sum(prices.of(name, member) for name, member in self.members.items())
        return prices.unit.with_limit(cost), cost / prices.whole()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "members": {name: member.to_dict() for name, member in self.members.items()},
            "formats": [one.to_dict() for one in self.formats],
            "allocation": self.allocation,
            "rise": self.rise,
            "bound": self.bound,
            "milliseconds": self.milliseconds,
        }

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Plan:
        """The plan of a description.

        Raises:
            IsogridError: not a plan's description.
        """
        try:
            return cls(
                {str(name): as_format(member) for name, member in described["members"].items()},
                tuple(as_format(one) for one in described["formats"]),
                str(described["allocation"]),
                described["rise"],
                described["bound"],
                described.get("milliseconds"),
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise IsogridError(f"not a plan of layers and formats: {type(error).__name__} {error}") from None


class Survey:
    """What every layer may cost and lose, measured once for any number of plans.

    Args:
        layers: name to dense layer.
        formats: what may be chosen from; sizes open.
        prices: what costs are counted in; None: parameters.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], formats: Sequence[Format], prices: Prices | None = None
    ) -> None:
        self.layers = layers
        self.formats = tuple(formats)
        self.prices = prices or StoredPrices(layers)
        self.curves = Curves(layers, formats, self.prices)
        self.weights: dict[str, float] | None = None
        self._seen: set[str] = set()

    def measure(self, model: nn.Module, calibration: list[Any] | Moments | None, also: Visit | None = None) -> Survey:
        """Errors of all layers under the inputs that they get in the dense model.

        Args:
            model: the dense model; it is not changed.
            calibration: batches or moments; None: errors of the matrices alone.
            also: called with each layer's name and metric, not centred (None where no data reaches it).
        """

        def visit(name: str, metric: Metric | None) -> None:
            has_bias = getattr(self.layers[name], "bias", None) is not None
            self.curves.visit(name, metric.centred if has_bias and metric is not None else metric)
            self._seen.add(name)
            if also is not None:
                also(name, metric)

        def probe(name: str, metric: Metric, _: Seen) -> nn.Module:
            visit(name, metric)
            return self.layers[name]

        if isinstance(calibration, Moments):
            for name in self.layers:
                if name in calibration.metrics:
                    visit(name, calibration.metrics[name].fresh())
        elif calibration is not None:
            in_order = InOrder(probe, calibration, anchored=False)
            with evaluation_mode(model):
                fit_in_order(model, self.layers, calibration, in_order, anchored=False)
        for name in self.layers:
            if name not in self._seen:
                visit(name, None)
        return self

    def weigh(self, model: nn.Module, calibration: list[Any], seed: int) -> Survey:
        """Sensitivities of the model's loss to all layers' errors: from now on `options` count in the loss."""
        self.weights = loss_weights(model, self.layers, few(calibration), seed=seed)
        return self

    def options(self, least: float = 0.0, formats: Sequence[Format] | None = None) -> dict[str, list[Option]]:
        """By layer, what may be chosen: see `Curves.of`."""
        found = {name: self.curves.of(name, least, formats) for name in self.layers}
        if self.weights is None:
            return found
        return {
            name: [dataclasses.replace(one, error=one.error * self.weights[name]) for one in of]
            for name, of in found.items()
        }

    def within(self, name: str, share: float) -> Format:
        """The member of the least error within a share of a layer's own cost.

        Raises:
            BudgetError: no format has one; names the layer.
        """
        limit = self.prices.share_of(name, share)
        options = self.curves.of(name, LEAST_SHARE * share)
        allowed = [one for one in [*options, *self.curves.largest(name, limit)] if one.cost <= limit]
        if not allowed:
            raise BudgetError(
                f"layer {name!r}: {' and '.join(one.label() for one in self.formats)} have no member within {limit} of "
                f"its {self.prices.dense(name)}, the smallest offered takes {options[0].cost}; keep more, "
                "allocate='global', or skip the layer"
            )
        return min(allowed, key=lambda one: one.error).format

    def best(self, limit: int, share: float, formats: Sequence[Format] | None = None) -> Plan:
        """The plan of the least predicted rise within a limit of the survey's prices; `weigh` comes before.

        Raises:
            BudgetError: nothing is that small.
        """
        options = self.options(LEAST_SHARE * share, formats)
        chosen = choose(options, limit)
        return Plan(
            {name: one.format for name, one in chosen.items()},
            self.formats if formats is None else tuple(formats),
            "global",
            rise=sum(one.error for one in chosen.values()),
            bound=lagrangian_bound(options, limit),
        )


def plan(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    formats: Sequence[Format],
    prices: Prices,
    limit: int,
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
        prices: what costs are counted in.
        limit: over all layers together.
        share: the same as a fraction of what the dense matrices cost.
        allocate: one of `ALLOCATIONS`.
        calibration: batches; moments do where only errors are asked for; None for what needs no data.
        seed: of the labels that sensitivities are measured with.

    Raises:
        IsogridError: an allocation that is unknown, or has no data, or doesn't suit the formats.
        BudgetError: nothing is that small.
    """
    check_allocation(allocate, formats, calibration)

    def planned(members: dict[str, Format]) -> Plan:
        return Plan(members, tuple(formats), allocate)

    if allocate == "welore":
        return planned(allocate_welore(layers, formats[0], prices, limit))
    if allocate == "uniform" and len(formats) == 1:
        return planned(allocate_uniform(layers, formats[0], share, prices))
    survey = Survey(layers, formats, prices).measure(model, calibration)
    if allocate == "uniform":
        return planned({name: survey.within(name, share) for name in layers})
    if allocate == "water_filling":
        # It asks for nothing but errors; the dense option and a least size are not its own.
        ranks = {
            name: [one for one in of if one.format.name == formats[0].name] or [of[-1]]  # nothing is smaller than dense
            for name, of in survey.options().items()
        }
        return planned({name: one.format for name, one in water_fill(ranks, limit).items()})
    assert isinstance(calibration, list)
    return survey.weigh(model, calibration, seed).best(limit, share)


def check_allocation(allocate: str, formats: Sequence[Format], calibration: Any) -> None:
    """Raise IsogridError where the request can't be met, before any work."""
    if allocate not in ALLOCATIONS:
        raise IsogridError(f"allocate is one of {', '.join(ALLOCATIONS)}; got {allocate!r}")
    if allocate == "global" and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError("allocate='global' measures the model on data: give calibration batches or texts")
    if allocate in ("welore", "water_filling") and len(formats) != 1:
        raise IsogridError(f"allocate={allocate!r} chooses ranks of one format; give one, or allocate='global'")
    if allocate == "water_filling" and not chooses_ranks(formats[0]):
        raise IsogridError(f"water filling chooses ranks of low_rank or low_rank_light, got {formats[0].label()}")


def few(batches: list[Any]) -> list[Any]:
    """Eight windows one by one, long ones in pieces: a backward pass holds all activations at once.

    A row of features says as much as a token does: as many are taken.
    """
    tensors = [batch for batch in batches if isinstance(batch, Tensor)]
    if tensors and tensors[0].ndim == 2 and tensors[0].is_floating_point():
        pieces = [piece for batch in tensors for piece in batch.split(SENSITIVITY_TOKENS)]
        ends = itertools.accumulate(len(piece) for piece in pieces)
        return [piece for piece, end in zip(pieces, ends, strict=True) if end - len(piece) < MOST_ROWS]
    single = [row for batch in batches[:SENSITIVITY_ROWS] if isinstance(batch, Tensor) for row in batch.split(1)]
    if not single:
        return batches[:SENSITIVITY_ROWS]
    tokens = [row for row in single[:SENSITIVITY_ROWS] if row.ndim == 2 and not row.is_floating_point()]
    if not tokens:
        return single[:SENSITIVITY_ROWS]
    return [piece for row in tokens for piece in row.split(SENSITIVITY_TOKENS, dim=1)]
