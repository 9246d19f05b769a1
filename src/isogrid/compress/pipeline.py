"""A trained model, made smaller: select, calibrate, allocate, fit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import mark_structured
from isogrid.compress.allocate import Option, allocate_global, allocate_uniform, error_curve
from isogrid.compress.anchor import Drift, DriftSum, anchored_target, output_distance
from isogrid.compress.calibrate import Moments, MomentSum, as_batches, evaluation_mode, forward_calls, real_rows
from isogrid.compress.lockstep import lockstep
from isogrid.compress.select import select_layers
from isogrid.compress.sensitivity import loss_weights
from isogrid.compress.summary import CompressionReport, LayerReport, count_parameters, stored_bytes
from isogrid.errors import IsogridError, IsogridWarning
from isogrid.fitting import Metric, widened
from isogrid.formats import Format, as_format
from isogrid.linear import StructuredLinear, linear_matrix

# A global allocation leaves every layer this share of what a uniform one would give it.
LEAST_SHARE = 0.3
SENSITIVITY_ROWS = 8
OnLayer = Callable[[LayerReport], None]


def compress(
    model: nn.Module,
    format: Format | str | Mapping[str, Any],
    *,
    keep: float = 0.5,
    calibration: Any = None,
    tokenizer: Any = None,
    length: int = 512,
    select: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = (),
    anchor: float = 0.0,
    allocate: str = "uniform",
    seed: int = 0,
    on_layer: OnLayer | None = None,
    **fit_options: Any,
) -> CompressionReport:
    """Rewrite a model's linear layers in a format, in place.

    Args:
        model: any module with ``nn.Linear`` or transformers ``Conv1D`` inside. Its mode and dtype are kept.
        format: a `Format`, its name (``"monarch(blocks=8)"``) or its description; its size is chosen by ``keep``.
        keep: fraction in (0, 1) of the selected dense parameters; every layer gets this share, rounded down.
        calibration: None for plain fits of the matrices; else data on which to keep the layers' *outputs* (batches,
            a tensor of token windows, texts: see `as_batches`), or `Moments` measured before. With data, layers are
            fitted in order, each on the inputs that it gets from the layers already compressed.
        tokenizer: for texts.
        length: window length in tokens, for texts.
        select: patterns of layer names; None: the linear layers of the repeated blocks (see `select_layers`).
        skip: patterns of layers to leave dense.
        anchor: from 0 (each layer keeps its own matrix on the inputs it now gets) to 1 (it aims at the original
            model's outputs, and so repairs what the layers before have lost). Needs calibration data, not `Moments`.
        allocate: "uniform", every layer the same share; or "global", one budget spent where the model's loss is most
            sensitive, layers left dense where that is best. Needs calibration data and two more passes through it.
        seed: of the fits' randomness, and of the labels that sensitivities are measured with.
        on_layer: called with the report of each finished layer.
        fit_options: passed to the format's solver.

    Returns:
        A `CompressionReport`. Where a layer has a bias, the fit moves the mean error into it.

    Raises:
        IsogridError: bad input; names the layer, the value and the remedy. Whatever is raised, also from outside, the
            model is then as it was before.
    """
    begun = time.perf_counter()
    fmt = as_format(format)
    if not 0 <= anchor <= 1:
        raise IsogridError(f"anchor is between 0 and 1, got {anchor}")
    if anchor and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError(
            f"anchor={anchor:g} compares two models on data: give calibration batches or texts, or anchor=0"
        )
    if allocate not in ("uniform", "global"):
        raise IsogridError(f"allocate is uniform or global, got {allocate!r}")
    if allocate == "global" and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError("allocate='global' measures the model on data: give calibration batches or texts")
    layers = select_layers(model, select, skip)
    sized = allocate_uniform(layers, fmt, keep)
    for name, module in layers.items():
        _check_weight(name, module)
    if not (calibration is None or isinstance(calibration, Moments)):
        calibration = as_batches(calibration, tokenizer, length)
    if allocate == "global":
        sized = _allocate_by_sensitivity(model, layers, fmt, keep, calibration, seed)
    report = CompressionReport(
        fmt, keep, dense_model_bytes=stored_bytes(model), dense_model_parameters=count_parameters(model)
    )
    generator = torch.Generator().manual_seed(seed)

    def fit(name: str, metric: Metric | None, seen: _Seen | None = None) -> StructuredLinear:
        new, layer_report = _fit_layer(name, layers[name], sized[name], metric, generator, fit_options, anchor, seen)
        report.layers.append(layer_report)
        if on_layer is not None:
            on_layer(layer_report)
        return new

    try:
        if calibration is None:
            for name in layers:
                model.set_submodule(name, fit(name, None))
        elif isinstance(calibration, Moments):
            report.calibration = f"{calibration.rows} rows, {calibration.source}"
            if not layers.keys() & calibration.metrics.keys():
                raise IsogridError("these moments know none of the selected layers; measure them on this model")
            source: Metric | None = None
            working: Metric | None = None
            for name in layers:
                known = calibration.metrics.get(name)
                if known is not source:
                    # Roots are three times the size of a moment: they live only while layers of this input are fitted.
                    source, working = known, None if known is None else known.fresh()
                model.set_submodule(name, fit(name, working))
        else:
            rows = _fit_in_order(model, layers, calibration, fit, anchored=anchor > 0)
            for name in [name for name in layers if name not in {done.name for done in report.layers}]:
                model.set_submodule(name, fit(name, None))
            report.calibration = f"{rows} rows, inputs of the compressed part"
        report.model_bytes, report.model_parameters = stored_bytes(model), count_parameters(model)
        report.warnings = _warnings(report)
        for message in report.warnings:  # inside: a caller's filter may make them errors
            warnings.warn(message, IsogridWarning, stacklevel=2)
        mark_structured(model, fmt)
    except BaseException:
        for name, module in layers.items():
            model.set_submodule(name, module)
        raise
    report.seconds = time.perf_counter() - begun
    return report


@dataclass
class _Seen:
    """One input of layers: where it came from, its metric, and the original model's rows of the same tokens."""

    indices: list[int]
    inputs: list[Tensor]
    versions: list[int]
    metric: Metric
    drift: Drift | None
    originals: list[Tensor]

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


def _fit_in_order(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: list[Any],
    fit: Callable[[str, Metric, _Seen], nn.Module],
    *,
    anchored: bool,
) -> int:
    """Fit each layer when all batches have reached it; layers of one input share its metric. Returns the rows."""
    most_rows = 0
    last: _Seen | None = None

    def visit(name: str, indices: list[int], inputs: list[Tensor]) -> nn.Module:
        nonlocal last, most_rows
        if last is None or not last.is_of(indices, inputs):
            present = {i: x for i, x in zip(indices, inputs, strict=True) if i < len(batches)}
            before = {i - len(batches): x for i, x in zip(indices, inputs, strict=True) if i >= len(batches)}
            total, moved, rows_before = MomentSum(), DriftSum(), []
            # Where the streams took different ways (experts), rows have no partners.
            paired = anchored and present.keys() == before.keys()
            paired = paired and all(before[i].shape == x.shape for i, x in present.items())
            for index, x in present.items():
                rows = real_rows(x, batches[index])
                total.add(rows)
                if paired:
                    rows_before.append(real_rows(before[index], batches[index]))
                    moved.add(rows_before[-1], rows)
            versions = [x._version for x in inputs]
            last = _Seen(indices, inputs, versions, total.metric(name), moved.drift(), rows_before)
            most_rows = max(most_rows, total.rows)
        return fit(name, last.metric, last)

    with evaluation_mode(model):
        forwards = forward_calls(model, batches)
        lockstep(model, forwards, layers, visit, forward_calls(model, batches) if anchored else ())
    if last is None:
        raise IsogridError(f"calibration reaches none of the {len(layers)} selected layers; check its form")
    return most_rows


def _allocate_by_sensitivity(
    model: nn.Module, layers: Mapping[str, nn.Module], fmt: Format, keep: float, batches: list[Any], seed: int
) -> dict[str, Format]:
    """Error curves on the dense model's inputs, weighted by what the errors cost its loss."""
    curves: dict[str, list[Option]] = {}

    def probe(name: str, metric: Metric, _: _Seen) -> nn.Module:
        module = layers[name]
        matrix = linear_matrix(module).detach()
        counted = metric.centred if module.bias is not None else metric
        curves[name] = error_curve(fmt, matrix, counted, math.floor(LEAST_SHARE * keep * matrix.numel()))
        return module

    _fit_in_order(model, layers, batches, probe, anchored=False)
    for name in layers:
        if name not in curves:
            matrix = linear_matrix(layers[name]).detach()
            curves[name] = error_curve(fmt, matrix, None, math.floor(LEAST_SHARE * keep * matrix.numel()))
    weights = loss_weights(model, layers, _few(batches), seed=seed)
    return allocate_global({name: curves[name] for name in layers}, weights, keep)


def _few(batches: list[Any]) -> list[Any]:
    """Eight windows one by one: gradients of whole batches would hold all their activations at once."""
    single = [row for batch in batches[:SENSITIVITY_ROWS] if isinstance(batch, Tensor) for row in batch.split(1)]
    return (single or batches)[:SENSITIVITY_ROWS]


def _fit_layer(
    name: str,
    linear: Any,
    fmt: Format,
    metric: Metric | None,
    generator: torch.Generator,
    options: Mapping[str, Any],
    anchor: float,
    seen: _Seen | None,
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
        target = anchored_target(matrix, cost_of_errors, cross, anchor).to(matrix)
    try:
        factors, fitted = fmt.fit_and_report(target, cost_of_errors, generator=generator, **options)
    except IsogridError as error:
        raise IsogridError(f"layer {name!r}: {error}") from error
    new_bias = None if bias is None else bias.detach().clone()
    if moves_bias and new_bias is not None and metric is not None and metric.mean is not None:
        wide = {key: widened(value) if value.is_floating_point() else value for key, value in factors.items()}
        residual = widened(matrix) - fmt.dense(wide, out_features, in_features)
        shift = residual @ metric.mean.to(residual.device)
        if drift is not None:
            shift += anchor * (widened(matrix) @ drift.shift.to(residual.device))
        new_bias = (widened(new_bias) + shift).to(new_bias)
    reached, upstream, least = fitted.error, 0.0, fitted.least_error
    if drift is not None and seen is not None and cost_of_errors is not None:
        energy = seen.energy(matrix, centred=moves_bias)
        exact = {key: widened(value) if value.is_floating_point() else value for key, value in factors.items()}
        dense = fmt.dense(exact, out_features, in_features)
        distance = partial(output_distance, matrix, cross=cross, moment=cost_of_errors.moment, energy=energy)
        reached, upstream = (_relative(distance(of), energy) for of in (dense, widened(target)))
        if fitted.lower_bound is not None:
            least = min(reached, _relative(fitted.lower_bound + upstream**2 * energy, energy))
    layer = StructuredLinear.from_factors(fmt, factors, out_features, in_features, bias=new_bias)
    layer.requires_grad_(linear.weight.requires_grad)
    if bias is not None and layer.bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    layer.train(linear.training)
    return layer, LayerReport(
        name=name,
        format=fmt,
        out_features=out_features,
        in_features=in_features,
        parameters=layer.cost().parameters,
        dense_parameters=out_features * in_features,
        error=reached,
        least_error=least,
        upstream=upstream,
        iterations=fitted.iterations,
        calibrated=metric is not None,
        rows=None if metric is None else metric.rows,
        bias_moved=moves_bias,
        seconds=time.perf_counter() - begun,
    )


def _relative(objective: float, whole: float) -> float:
    return (objective / whole) ** 0.5 if whole > 0 else 0.0


def _check_weight(name: str, module: nn.Module) -> None:
    weight = linear_matrix(module)
    if weight.is_meta:
        raise IsogridError(f"layer {name!r} is on the meta device: load the weights before compressing")
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise IsogridError(f"layer {name!r}: weight has {count} NaN or infinite entries; repair or skip the layer")


def _warnings(report: CompressionReport) -> list[str]:
    out = []
    if report.calibration is not None:
        plain = [layer.name for layer in report.layers if not layer.calibrated]
        if plain:
            out.append(
                f"{len(plain)} layers were not reached by the calibration and got plain fits, the first {plain[0]!r}; "
                "skip them or give data that reaches them"
            )
    few = [layer for layer in report.layers if layer.rows is not None and layer.rows < layer.in_features]
    if few:
        worst = min(few, key=lambda layer: (layer.rows or 0) / layer.in_features)
        out.append(
            f"{len(few)} layers have fewer calibration rows than inputs, the worst {worst.name!r} ({worst.rows} "
            f"rows for {worst.in_features} inputs): these fits follow the sample; give 8 times as many"
        )
    return out
