"""A trained model, made smaller: select, calibrate, allocate, fit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import mark_structured
from isogrid.compress.allocate import Option, allocate_global, allocate_uniform, error_curve
from isogrid.compress.blockwise import fit_by_blocks
from isogrid.compress.calibrate import ROWS_PER_BATCH, Moments, as_batches, evaluation_mode
from isogrid.compress.layerwise import InOrder, Seen, fit_in_order, fit_layer
from isogrid.compress.refine import OnBlock, Refinement
from isogrid.compress.select import select_layers
from isogrid.compress.sensitivity import loss_weights
from isogrid.compress.summary import CompressionReport, LayerReport, count_parameters, stored_bytes
from isogrid.errors import IsogridError, IsogridWarning
from isogrid.fitting import Metric
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
    refine: Refinement | float | None = None,
    seed: int = 0,
    on_layer: OnLayer | None = None,
    on_block: OnBlock | None = None,
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
        refine: train each block, when its layers are fitted, until its outputs are as near to the original model's as
            they get: minutes for all blocks, or a `Refinement`; None: no training. Needs calibration data.
        seed: of the fits' randomness, and of the labels that sensitivities are measured with.
        on_layer: called with the report of each finished layer.
        on_block: called with the report of each refined block.
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
    if refine is not None and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError("refine trains blocks on data: give calibration batches or texts")
    refinement = Refinement(minutes=refine) if isinstance(refine, int | float) else refine
    layers = select_layers(model, select, skip)
    sized = allocate_uniform(layers, fmt, keep)
    for name, module in layers.items():
        _check_weight(name, module)
    if not (calibration is None or isinstance(calibration, Moments)):
        # Refinement takes its steps and holds out in whole batches: small ones.
        rows = ROWS_PER_BATCH if refinement is None else 1
        calibration = as_batches(calibration, tokenizer, length, rows)
    if allocate == "global":
        sized = _allocate_by_sensitivity(model, layers, fmt, keep, calibration, seed)
    report = CompressionReport(
        fmt, keep, dense_model_bytes=stored_bytes(model), dense_model_parameters=count_parameters(model)
    )
    generator = torch.Generator().manual_seed(seed)

    def fit(name: str, metric: Metric | None, seen: Seen | None = None) -> StructuredLinear:
        new, layer_report = fit_layer(name, layers[name], sized[name], metric, generator, fit_options, anchor, seen)
        report.layers.append(layer_report)
        if on_layer is not None:
            on_layer(layer_report)
        return new

    vectors = {} if refinement is None else _vectors(model)
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
            visit = InOrder(fit, calibration, anchored=anchor > 0)
            with evaluation_mode(model):
                if refinement is None:
                    fit_in_order(model, layers, calibration, visit, anchored=anchor > 0)
                else:
                    report.blocks = fit_by_blocks(
                        model,
                        layers,
                        calibration,
                        visit,
                        refinement,
                        anchored=anchor > 0,
                        seed=seed,
                        on_block=on_block,
                    )
            if not visit.rows:
                raise IsogridError(f"calibration reaches none of the {len(layers)} selected layers; check its form")
            for name in [name for name in layers if name not in {done.name for done in report.layers}]:
                model.set_submodule(name, fit(name, None))
            report.calibration = f"{visit.rows} rows, inputs of the compressed part"
        report.model_bytes, report.model_parameters = stored_bytes(model), count_parameters(model)
        report.warnings = _warnings(report)
        for message in report.warnings:  # inside: a caller's filter may make them errors
            warnings.warn(message, IsogridWarning, stacklevel=2)
        mark_structured(model, fmt)
    except BaseException:
        for name, module in layers.items():
            model.set_submodule(name, module)
        with torch.no_grad():
            for name, value in vectors.items():
                model.get_parameter(name).copy_(value)
        raise
    report.seconds = time.perf_counter() - begun
    return report


def _allocate_by_sensitivity(
    model: nn.Module, layers: Mapping[str, nn.Module], fmt: Format, keep: float, batches: list[Any], seed: int
) -> dict[str, Format]:
    """Error curves on the dense model's inputs, weighted by what the errors cost its loss."""
    curves: dict[str, list[Option]] = {}

    def probe(name: str, metric: Metric, _: Seen) -> nn.Module:
        module = layers[name]
        matrix = linear_matrix(module).detach()
        counted = metric.centred if module.bias is not None else metric
        curves[name] = error_curve(fmt, matrix, counted, math.floor(LEAST_SHARE * keep * matrix.numel()))
        return module

    with evaluation_mode(model):
        fit_in_order(model, layers, batches, InOrder(probe, batches, anchored=False), anchored=False)
    for name in layers:
        if name not in curves:
            matrix = linear_matrix(layers[name]).detach()
            curves[name] = error_curve(fmt, matrix, None, math.floor(LEAST_SHARE * keep * matrix.numel()))
    weights = loss_weights(model, layers, _few(batches), seed=seed)
    return allocate_global({name: curves[name] for name in layers}, weights, keep)


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    """What refinement may change beside the layers: gains and biases, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.ndim <= 1}


def _few(batches: list[Any]) -> list[Any]:
    """Eight windows one by one: gradients of whole batches would hold all their activations at once."""
    single = [row for batch in batches[:SENSITIVITY_ROWS] if isinstance(batch, Tensor) for row in batch.split(1)]
    return (single or batches)[:SENSITIVITY_ROWS]


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
