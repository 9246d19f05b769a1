"""What each way to write a layer would cost and lose: curves of error over size, of one format or of several.

Low rank and Light tell all their errors from one decomposition. Other formats have to be fitted to be known, which is
too slow for every layer at every size: they are fitted at a few sizes on two layers of each kind (the same projection
in other blocks is the same kind), and what they lose there, relative to Light at equal cost, is taken for the others.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn

from isogrid.compress.allocate import Option
from isogrid.compress.prices import Prices, StoredPrices
from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import Metric, rank_errors, squared_norm, widened
from isogrid.formats import Budget, Dense, Format
from isogrid.linear import linear_matrix

# Sizes at which a format without a closed curve is fitted, as shares of the dense parameters.
PROBES = (0.2, 0.4, 0.6, 0.8)
# Sizes that such a format offers the choice.
OFFERED = tuple(0.05 * step for step in range(2, 19))
# Layers of a kind that are fitted: all of few, else so many.
SAMPLES_OF_A_KIND, FEW = 2, 4


@dataclass(frozen=True)
class _Reference:
    """Light's squared errors over its costs: what other formats are compared with."""

    costs: list[int]
    errors: list[float]

    @classmethod
    def of(cls, matrix: Tensor, metric: Metric | None, tails: Sequence[float]) -> _Reference:
        out_features, in_features = matrix.shape
        whole = squared_norm(widened(matrix), metric)
        errors = [whole, *tails]
        # The last ranks' errors are rounding; a logarithm needs more.
        errors = [max(error, 1e-12 * whole, 1e-300) for error in errors]
        return cls([rank * (out_features + in_features - rank) for rank in range(len(errors))], errors)

    def at(self, cost: float) -> float:
        """Interpolated in the logarithm."""
        if cost >= self.costs[-1]:
            return self.errors[-1]
        above = max(bisect_left(self.costs, cost), 1)
        low, high = self.costs[above - 1], self.costs[above]
        place = (cost - low) / (high - low)
        return self.errors[above - 1] ** (1 - place) * self.errors[above] ** place


class Curves:
    """Collects the curves of layers, visited one after the other with their metrics.

    Args:
        layers: name to dense layer.
        formats: the formats that may be chosen from, sizes open.
        prices: what costs are counted in; None: parameters.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], formats: Sequence[Format], prices: Prices | None = None
    ) -> None:
        self._layers = layers
        self._formats = formats
        self._prices = prices or StoredPrices(layers)
        self._closed: dict[str, dict[Format, list[Option]]] = {}
        self._spectra: dict[str, dict[Format, list[float]]] = {}  # the errors of all sizes
        self._references: dict[str, _Reference] = {}
        # By format and kind: the probed layers' (share, log ratio to Light) by name.
        self._ratios: dict[tuple[Format, str], dict[str, list[tuple[float, float]]]] = {}
        self._sampled = sampled(layers)

    def visit(self, name: str, metric: Metric | None) -> None:
        """Measure one layer."""
        matrix = linear_matrix(self._layers[name]).detach()
        found: dict[Format, list[Option]] = {}
        spectra = self._spectra[name] = {}
        tails = rank_errors(widened(matrix), metric)
        for fmt in self._formats:
            spectrum = fmt.error_curve(tails)
            if spectrum is not None:
                spectra[fmt] = spectrum
                step = -(-len(spectrum) // self._prices.sizes)
                if len(spectrum) >= 8 * self._prices.multiple:
                    step = self._prices.multiple * -(-step // self._prices.multiple)
                sizes = range(step, len(spectrum) + 1, step)
                members = [(fmt.with_size(size), spectrum[size - 1]) for size in sizes]
                found[fmt] = [Option(one, self._prices.of(name, one), error) for one, error in members]
                continue
            if name not in self._references:
                self._references[name] = _Reference.of(matrix, metric, tails)
            if name in self._sampled:
                probed = self._probe(fmt, matrix, metric, self._references[name])
                self._ratios.setdefault((fmt, kind(name, matrix)), {})[name] = probed
        self._closed[name] = found

    def of(self, name: str, least: float = 0.0, formats: Sequence[Format] | None = None) -> list[Option]:
        """Options of one layer by rising cost, the dense matrix last.

        Args:
            name: of the layer.
            least: no member of less than this share of the layer's dense cost, if there is a larger one: errors
                of very small members are beyond what a quadratic loss can tell (fitting theory 5.3).
            formats: only these; None: all.

        Raises:
            IsogridError: the layer was not visited.
        """
        if name not in self._closed:
            raise IsogridError(f"layer {name!r} has not been measured")
        matrix = linear_matrix(self._layers[name])
        found: list[Option] = []
        for fmt in self._formats if formats is None else formats:
            closed = self._closed[name].get(fmt)
            found += self._scaled(fmt, name, matrix) if closed is None else closed
        dense = Option(Dense(), self._prices.dense(name), 0.0)
        smaller = sorted((one for one in found if one.cost < dense.cost), key=lambda one: one.cost)
        allowed = [one for one in smaller if one.cost >= least * dense.cost] or smaller[-1:]
        return [*allowed, dense]

    def largest(self, name: str, limit: int) -> list[Option]:
        """Of each format its largest member within a limit; of one that has none so small, nothing."""
        matrix = linear_matrix(self._layers[name])
        found: list[Option] = []
        for fmt in self._formats:
            tables = self._tables(fmt, name, matrix)
            spectrum = self._spectra[name].get(fmt)
            if spectrum is None and not tables:
                continue
            try:
                member = self._prices.within(name, fmt, limit)
            except BudgetError:
                continue
            if spectrum is None:
                error = self._scaled_error(member, name, matrix, tables)
            else:
                assert fmt.size_field is not None
                error = spectrum[getattr(member, fmt.size_field) - 1]
            found.append(Option(member, self._prices.of(name, member), error))
        return found

    def _probe(
        self, fmt: Format, matrix: Tensor, metric: Metric | None, reference: _Reference
    ) -> list[tuple[float, float]]:
        out_features, in_features = matrix.shape
        found: dict[float, float] = {}
        for share in PROBES:
            member = _member(fmt, share, out_features, in_features)
            if member is None:
                continue
            parameters = member.cost(out_features, in_features).parameters
            factors = member.fit(matrix, metric)
            error = squared_norm(widened(matrix) - widened(member.dense(factors, out_features, in_features)), metric)
            ratio = max(error, 1e-300) / reference.at(parameters)
            found[parameters / matrix.numel()] = math.log(ratio)
        return sorted(found.items())

    def _tables(self, fmt: Format, name: str, matrix: Tensor) -> list[list[tuple[float, float]]]:
        """The layer's own ratios, or those of the probed layers of its kind."""
        known = self._ratios.get((fmt, kind(name, matrix)), {})
        tables = [known[name]] if name in known else list(known.values())
        return [table for table in tables if table]

    def _scaled_error(
        self, member: Format, name: str, matrix: Tensor, tables: Sequence[Sequence[tuple[float, float]]]
    ) -> float:
        parameters = member.cost(*matrix.shape).parameters
        ratio = sum(_interpolated(table, parameters / matrix.numel()) for table in tables) / len(tables)
        return self._references[name].at(parameters) * math.exp(ratio)

    def _scaled(self, fmt: Format, name: str, matrix: Tensor) -> Iterable[Option]:
        tables = self._tables(fmt, name, matrix)
        if not tables:
            return
        seen: set[Format] = set()
        own = [share for share, _ in tables[0]] if name in self._ratios[fmt, kind(name, matrix)] else []
        for share in sorted({*OFFERED, *own}):
            member = _member(fmt, share, *matrix.shape)
            if member is None or member in seen:
                continue
            seen.add(member)
            yield Option(member, self._prices.of(name, member), self._scaled_error(member, name, matrix, tables))


def kind(name: str, matrix: Tensor) -> str:
    """Layers of one kind have one shape and one name but for its numbers."""
    return f"{re.sub(r'[0-9]+', '*', name)} {tuple(matrix.shape)}"


def sampled(layers: Mapping[str, nn.Module]) -> set[str]:
    """A few layers of each kind, spread over the depth."""
    kinds: dict[str, list[str]] = {}
    for name, module in layers.items():
        kinds.setdefault(kind(name, linear_matrix(module)), []).append(name)
    found: set[str] = set()
    for names in kinds.values():
        count = len(names) if len(names) <= FEW else SAMPLES_OF_A_KIND
        found |= {names[(2 * place + 1) * len(names) // (2 * count)] for place in range(count)}
    return found


@cache
def _member(fmt: Format, share: float, out_features: int, in_features: int) -> Format | None:
    try:
        return fmt.sized(out_features, in_features, Budget.keep(min(share, 1.0), out_features, in_features))
    except BudgetError:
        return None


def _interpolated(table: Sequence[tuple[float, float]], share: float) -> float:
    """Between two probes; outside of them, the nearest."""
    if share <= table[0][0]:
        return table[0][1]
    for (low, before), (high, after) in itertools.pairwise(table):
        if share <= high:
            place = (share - low) / (high - low)
            return (1 - place) * before + place * after
    return table[-1][1]


def error_curve(fmt: Format, matrix: Tensor, metric: Metric | None, least: float = 0.0) -> list[Option]:
    """The curve of one matrix, squared errors ``||(W - V) M^½||²`` over parameters, the dense matrix last.

    Args:
        fmt: the format, its size open.
        matrix: ``(out, in)``.
        metric: of the inputs.
        least: smallest share of the dense parameters.
    """
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix.detach(), requires_grad=False)
    curves = Curves({"": layer}, [fmt])
    curves.visit("", metric)
    return curves.of("", least)
