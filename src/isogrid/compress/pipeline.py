"""A trained model, made smaller: select, calibrate, allocate, fit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import mark_structured
from isogrid.compress.allocate import allocate_uniform
from isogrid.compress.calibrate import Moments, MomentSum, as_batches, evaluation_mode, forward_calls, real_rows
from isogrid.compress.lockstep import lockstep
from isogrid.compress.select import select_layers
from isogrid.compress.summary import CompressionReport, LayerReport, count_parameters, stored_bytes
from isogrid.errors import IsogridError, IsogridWarning
from isogrid.fitting import Metric, widened
from isogrid.formats import Format, as_format
from isogrid.linear import StructuredLinear, linear_matrix

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
        seed: of the fits' randomness.
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
    layers = select_layers(model, select, skip)
    sized = allocate_uniform(layers, fmt, keep)
    for name, module in layers.items():
        _check_weight(name, module)
    report = CompressionReport(
        fmt, keep, dense_model_bytes=stored_bytes(model), dense_model_parameters=count_parameters(model)
    )
    generator = torch.Generator().manual_seed(seed)

    def fit(name: str, metric: Metric | None) -> StructuredLinear:
        new, layer_report = _fit_layer(name, layers[name], sized[name], metric, generator, fit_options)
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
            batches = as_batches(calibration, tokenizer, length)
            rows = _fit_in_order(model, layers, batches, fit)
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


def _fit_in_order(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: list[Any],
    fit: Callable[[str, Metric | None], StructuredLinear],
) -> int:
    """Fit each layer when all batches have reached it; layers of one input share its metric. Returns the rows."""
    most_rows = 0
    last: tuple[list[int], list[Tensor], list[int], Metric] | None = None

    def visit(name: str, indices: list[int], inputs: list[Tensor]) -> StructuredLinear:
        nonlocal last, most_rows
        versions = [x._version for x in inputs]
        if (
            last is not None
            and last[0] == indices
            and all(x is known for x, known in zip(inputs, last[1], strict=True))
            and last[2] == versions
        ):
            metric = last[3]
        else:
            total = MomentSum()
            for index, x in zip(indices, inputs, strict=True):
                total.add(real_rows(x, batches[index]))
            metric = total.metric(name)
            last = (indices, inputs, versions, metric)
            most_rows = max(most_rows, total.rows)
        return fit(name, metric)

    with evaluation_mode(model):
        lockstep(model, forward_calls(model, batches), layers, visit)
    if last is None:
        raise IsogridError(f"calibration reaches none of the {len(layers)} selected layers; check its form")
    return most_rows


def _fit_layer(
    name: str,
    linear: Any,
    fmt: Format,
    metric: Metric | None,
    generator: torch.Generator,
    options: Mapping[str, Any],
) -> tuple[StructuredLinear, LayerReport]:
    """One layer's matrix in its format; with a bias and a known mean, the mean error moves into the bias."""
    begun = time.perf_counter()
    matrix = linear_matrix(linear)
    out_features, in_features = matrix.shape
    bias: Tensor | None = linear.bias
    moves_bias = bias is not None and metric is not None and metric.mean is not None
    cost_of_errors = metric.centred if metric is not None and moves_bias else metric
    try:
        factors, fitted = fmt.fit_and_report(matrix, cost_of_errors, generator=generator, **options)
    except IsogridError as error:
        raise IsogridError(f"layer {name!r}: {error}") from error
    new_bias = None if bias is None else bias.detach().clone()
    if moves_bias and new_bias is not None and metric is not None and metric.mean is not None:
        wide = {key: widened(value) if value.is_floating_point() else value for key, value in factors.items()}
        residual = widened(matrix) - fmt.dense(wide, out_features, in_features)
        shift = residual @ metric.mean.to(residual.device)
        new_bias = (widened(new_bias) + shift).to(new_bias)
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
        error=fitted.error,
        least_error=fitted.least_error,
        iterations=fitted.iterations,
        calibrated=metric is not None,
        rows=None if metric is None else metric.rows,
        bias_moved=moves_bias,
        seconds=time.perf_counter() - begun,
    )


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
