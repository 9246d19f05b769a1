"""One layer after the other: each matrix fitted on the inputs it gets from the part that is already compressed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress.anchor import Drift, DriftSum, anchored_target, output_distance
from isogrid.compress.calibrate import MomentSum, forward_calls, real_rows
from isogrid.compress.lockstep import Halt, lockstep
from isogrid.compress.summary import LayerReport
from isogrid.errors import IsogridError
from isogrid.fitting import Metric, widened
from isogrid.formats import Format
from isogrid.linear import StructuredLinear, linear_matrix


@dataclass
class Seen:
    """One input of layers.

    Attributes:
        indices: of the batches it came from.
        inputs: the very tensors.
        versions: theirs, when they were measured.
        metric: of the rows that fits know.
        drift: how they have moved from the original model's; None where they aren't compared.
        originals: rows of the original model, in the same order, where they are compared.
        held: rows that fits don't know: (as they are now, as they were in the original model where compared).
    """

    indices: list[int]
    inputs: list[Tensor]
    versions: list[int]
    metric: Metric
    drift: Drift | None
    originals: list[Tensor]
    held: list[tuple[Tensor, Tensor]]

    def is_of(self, indices: list[int], inputs: list[Tensor]) -> bool:
        """Whether these are the very inputs, unchanged since."""
        return (
            self.indices == indices
            and all(x is known for x, known in zip(inputs, self.inputs, strict=True))
            and self.versions == [x._version for x in inputs]
        )

    def energy(self, matrix: Tensor, *, centred: bool) -> float:
        """``E ||W x||²`` of the original rows, or about the mean."""
        square, total, rows = 0.0, torch.zeros(matrix.shape[0], dtype=torch.float64), 0
        for x in self.originals:
            y = x.to(torch.float32) @ matrix.detach().to(torch.float32).mT
            square += float(y.square().sum(dtype=torch.float64))
            total += y.sum(0, dtype=torch.float64).cpu()
            rows += len(y)
        return square / rows - (float((total / rows).square().sum()) if centred else 0.0)

    def held_error(self, linear: nn.Module, layer: StructuredLinear, mean: Tensor | None) -> float | None:
        """Relative output error of a layer on the rows that its fit didn't know; None without any.

        Args:
            linear: the original layer.
            layer: the fitted one.
            mean: of the inputs that the fit knew, where outputs are counted about it.
        """
        lost, whole = 0.0, 0.0
        matrix = linear_matrix(linear).detach().to(torch.float32)
        middle = None if mean is None else matrix @ mean.to(matrix)
        with torch.no_grad():
            for now, before in self.held:
                wanted = before.to(torch.float32) @ matrix.mT
                found = layer(now.to(layer.floating_factor().dtype)).to(torch.float32)
                if linear.bias is not None:
                    found = found - linear.bias.detach().to(torch.float32)  # type: ignore[operator]
                lost += float((wanted - found).square().sum(dtype=torch.float64))
                whole += float((wanted if middle is None else wanted - middle).square().sum(dtype=torch.float64))
        return _relative(lost, whole) if self.held else None


class InOrder:
    """Visits layers as their inputs arrive; layers of one input share its metric.

    Args:
        fit: ``(layer name, metric, seen) -> module that takes its place``.
        batches: of the calibration, whose masks tell which rows are padding.
        anchored: whether to compare with the passes through the original model that come along.
        original: whether the metric is that of the original model's inputs, which then have to come along.
        held_out: share of each batch's rows, its last, that fits don't know and are judged by.
    """

    def __init__(
        self,
        fit: Callable[[str, Metric, Seen], nn.Module],
        batches: Sequence[Any],
        *,
        anchored: bool,
        original: bool = False,
        held_out: float = 0.0,
    ) -> None:
        self._held_out = held_out
        self._original = original
        self._fit = fit
        self._batches = batches
        self._anchored = anchored
        self._last: Seen | None = None

    def __call__(self, name: str, halts: Sequence[Halt]) -> nn.Module:
        """A visit of `lockstep`."""
        indices, inputs = [halt.index for halt in halts], [halt.input for halt in halts]
        if self._last is None or not self._last.is_of(indices, inputs):
            self._last = None  # lets go of the inputs before
            self._last = self._measured(name, indices, inputs)
        return self._fit(name, self._last.metric, self._last)

    def forget(self) -> None:
        """Let go of the last inputs: what comes next is no layer's fit, and they may outweigh a model."""
        self._last = None

    def _measured(self, name: str, indices: list[int], inputs: list[Tensor]) -> Seen:
        batches = self._batches
        present = {i: x for i, x in zip(indices, inputs, strict=True) if i < len(batches)}
        before = {i - len(batches): x for i, x in zip(indices, inputs, strict=True) if i >= len(batches)}
        if self._original and before:
            present = before
        total, moved = MomentSum(), DriftSum()
        rows_before: list[Tensor] = []
        held: list[tuple[Tensor, Tensor]] = []
        # Where the streams took different ways (experts), rows have no partners.
        paired = self._anchored and present.keys() == before.keys()
        paired = paired and all(before[i].shape == x.shape for i, x in present.items())
        for index, x in present.items():
            rows = real_rows(x, batches[index])
            old = real_rows(before[index], batches[index]) if paired else rows
            cut = len(rows) - int(self._held_out * len(rows))
            if cut < len(rows):
                held.append((rows[cut:], old[cut:]))
            total.add(rows[:cut])
            if paired:
                rows_before.append(old[:cut])
                moved.add(old[:cut], rows[:cut])
        versions = [x._version for x in inputs]
        return Seen(indices, inputs, versions, total.metric(name), moved.drift(), rows_before, held)


def fit_in_order(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], visit: InOrder, *, anchored: bool
) -> None:
    """Fit each layer when all batches have reached it, in one pass; with the original model's passes if anchored."""
    lockstep(model, forward_calls(model, batches), layers, visit, forward_calls(model, batches) if anchored else ())


def fit_layer(
    name: str,
    linear: Any,
    fmt: Format,
    metric: Metric | None,
    generator: torch.Generator,
    options: Mapping[str, Any],
    anchor: float,
    seen: Seen | None,
) -> tuple[StructuredLinear, LayerReport]:
    """One layer's matrix in its format; with a bias and a known mean, the mean error moves into the bias."""
    begun = time.perf_counter()
    matrix = linear_matrix(linear)
    out_features, in_features = matrix.shape
    bias: Tensor | None = linear.bias
    moves_bias = bias is not None and metric is not None and metric.mean is not None
    cost_of_errors = metric.centred if metric is not None and moves_bias else metric
    drift = seen.drift if seen is not None and anchor else None
    target = matrix
    if drift is not None and cost_of_errors is not None:
        cross = drift.centred if moves_bias else drift.cross
        mixed = anchored_target(matrix, cost_of_errors, cross, anchor)
        restoring = widened(matrix) + (mixed - widened(matrix)) / anchor
        target = mixed.to(matrix)
    try:
        factors, fitted = fmt.fit_and_report(target, cost_of_errors, generator=generator, **options)
    except IsogridError as error:
        raise IsogridError(f"layer {name!r}: {error}") from error
    # As they would be loaded: views of what the fit computed multiply in another order, so with other rounding.
    factors = {key: value.contiguous() for key, value in factors.items()}
    new_bias = None if bias is None else bias.detach().clone()
    if moves_bias and new_bias is not None and metric is not None and metric.mean is not None:
        wide = {key: widened(value) if value.is_floating_point() else value for key, value in factors.items()}
        residual = widened(matrix) - fmt.dense(wide, out_features, in_features)
        shift = residual @ metric.mean.to(residual.device)
        if drift is not None:
            shift += anchor * (widened(matrix) @ drift.shift.to(residual.device))
        new_bias = (widened(new_bias) + shift).to(new_bias)
    reached, upstream, least = fitted.error, 0.0, fitted.least_error
    known = reached
    if drift is not None and seen is not None and cost_of_errors is not None:
        exact = {key: widened(value) if value.is_floating_point() else value for key, value in factors.items()}
        dense = fmt.dense(exact, out_features, in_features)
        # As fits count errors: damping is noise on both inputs alike, so the original outputs have it, too.
        ridge = cost_of_errors.matrix - cost_of_errors.moment
        sampled = seen.energy(matrix, centred=moves_bias)
        energy = sampled + _energy(matrix, ridge)
        distance = partial(output_distance, matrix, cross=cross, moment=cost_of_errors.matrix, energy=energy)
        # Of the mean that the layers before have lost a bias restores as much as the anchor says.
        mean = (1 - anchor) * (widened(matrix) @ drift.shift.to(dense.device)) if moves_bias else dense.new_zeros(())
        lost_mean = float(mean.square().sum())
        known = _relative(distance(dense, moment=cost_of_errors.moment, energy=sampled) + lost_mean, sampled)
        reached, upstream = _relative(distance(dense) + lost_mean, energy), _relative(distance(restoring), energy)
        if fitted.lower_bound is not None:
            # The bound is a distance from the fit's target; the outputs' is counted from the one that restores them.
            aside = cost_of_errors.squared_norm(restoring - widened(target)) ** 0.5
            lost = max(fitted.lower_bound**0.5 - aside, 0.0) ** 2
            least = min(reached, _relative(lost + upstream**2 * energy, energy))  # equal but for rounding
    layer = StructuredLinear.from_factors(fmt, factors, out_features, in_features, bias=new_bias)
    take_flags(layer, linear)
    layer.train(linear.training)
    held_error = None
    if seen is not None and metric is not None:
        held_error = seen.held_error(linear, layer, metric.mean if moves_bias else None)
    return layer, LayerReport(
        name=name,
        format=fmt,
        out_features=out_features,
        in_features=in_features,
        parameters=layer.cost().parameters,
        dense_parameters=out_features * in_features,
        error=reached,
        known_error=known,
        held_error=held_error,
        least_error=least,
        upstream=upstream,
        iterations=fitted.iterations,
        calibrated=metric is not None,
        rows=None if metric is None else metric.rows,
        bias_moved=moves_bias,
        seconds=time.perf_counter() - begun,
    )


def take_flags(layer: StructuredLinear, linear: nn.Module) -> None:
    """Train a layer's factors where the dense matrix, or what it is computed from, was trained; its bias likewise."""
    bias = linear.bias
    layer.requires_grad_(any(value.requires_grad for value in linear.parameters() if value is not bias))
    if isinstance(bias, Tensor) and layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)


def _energy(matrix: Tensor, moment: Tensor) -> float:
    wide = widened(matrix).to(moment)
    return float(((wide @ moment) * wide).sum())


def _relative(objective: float, whole: float) -> float:
    return (objective / whole) ** 0.5 if whole > 0 else 0.0
