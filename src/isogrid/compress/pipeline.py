"""A trained model, made smaller: select, calibrate, allocate, fit."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import mark_structured
from isogrid.compress.allocate import check_keep, refuse_explicit_sizes
from isogrid.compress.batches import as_batches
from isogrid.compress.blockwise import ByBlocks
from isogrid.compress.calibrate import Moments, evaluation_mode
from isogrid.compress.distill import Distillation, original_view
from isogrid.compress.distill import distill as distill_model
from isogrid.compress.layerwise import InOrder, Seen, fit_in_order, fit_layer
from isogrid.compress.milliseconds import Milliseconds, TimedPrices, measured_beside_dense
from isogrid.compress.plan import Plan, check_allocation, plan
from isogrid.compress.prices import Prices, StoredPrices
from isogrid.compress.progress import Progress, fingerprint
from isogrid.compress.refine import OnBlock, Refinement
from isogrid.compress.select import select_layers
from isogrid.compress.summary import CompressionReport, LayerReport, count_parameters, stored_bytes
from isogrid.errors import IsogridError, IsogridWarning
from isogrid.fitting import Metric
from isogrid.formats import Budget, Dense, Format, as_format
from isogrid.linear import StructuredLinear, check_memory, limit_memory, linear_matrix

# What `format="auto"` chooses from: the formats whose calibrated fits have won on some kind of layer.
AUTO = ("low_rank_light", "blast", "monarch", "block_tensor_train")
# A fit whose error on held-out rows is this many times its own follows its sample.
OVERFITTED = 1.5
OnLayer = Callable[[LayerReport], None]


def compress(
    model: nn.Module,
    format: Format | str | Mapping[str, Any] | Iterable[Any] | Plan,
    *,
    keep: float = 0.5,
    budget: Budget | Milliseconds | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    length: int = 512,
    select: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = (),
    inputs: str = "compressed",
    anchor: float = 0.0,
    allocate: str = "uniform",
    held_out: float = 0.0,
    refine: Refinement | float | None = None,
    distill: Distillation | float | None = None,
    resume: str | Path | None = None,
    memory: str = "fast",
    seed: int = 0,
    on_layer: OnLayer | None = None,
    on_block: OnBlock | None = None,
    **fit_options: Any,
) -> CompressionReport:
    """Rewrite a model's linear layers in a format, in place.

    Args:
        model: any module with ``nn.Linear`` or transformers ``Conv1D`` inside. Its mode and dtype are kept.
        format: a `Format`, its name (``"monarch(blocks=8)"``) or its description; its size is chosen by ``keep``.
            Several of these, or "auto" (`AUTO`): the best for each layer is chosen. Or a `Plan` made before (see
            `advise`), which says what each layer gets; then ``keep``, ``budget`` and ``allocate`` don't count.
        keep: fraction in (0, 1) of the selected dense parameters.
        budget: instead of ``keep``, parameters or bytes for all selected matrices together, or `Milliseconds` for a
            pass of the whole model on this machine.
        calibration: None for plain fits of the matrices; else data on which to keep the layers' *outputs* (batches,
            a tensor of token windows, texts: see `as_batches`), or `Moments` measured before. With data, layers are
            fitted in order.
        tokenizer: for texts.
        length: window length in tokens, for texts.
        select: patterns of layer names; None: the linear layers of the repeated blocks (see `select_layers`).
        skip: patterns of layers to leave dense.
        inputs: "compressed": each layer is fitted on the inputs that it gets from the layers already compressed;
            "original": on those of the original model, as SVD-LLM and AA-SVD do.
        anchor: from 0 (each layer keeps its own matrix on the inputs it now gets) to 1 (it aims at the original
            model's outputs, and so repairs what the layers before have lost). Needs calibration data, not `Moments`.
        allocate: "uniform", every layer the same share, rounded down; "global", one budget spent where the model's loss
            is most sensitive, layers left dense where that is best (needs data, and two more passes through it);
            "water_filling", one budget by the whitened spectra alone; "welore", by WeLore's threshold, without data.
            The last two choose ranks of low rank or Light.
        held_out: share of the calibration rows (the last of each batch) that fits don't know, to tell where they have
            learnt their sample by heart: `LayerReport.held_error`, and a warning. The command takes a sixteenth.
        refine: train each block, when its layers are fitted, until its outputs are as near to the original model's as
            they get: minutes for all blocks, or a `Refinement`; None: no training. Needs calibration data.
        distill: at the end, train the whole model towards the original's predictions: minutes, or a `Distillation`.
        resume: a folder where finished blocks are kept: the same call, after an interruption, goes on from there. It is
            left when all is done; delete it then. Needs calibration batches or texts.
        memory: what the compressed layers may keep beside their factors when they multiply: "fast" or "small" (see
            `set_memory`); saved with the model.
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
    check_memory(memory)
    given = format if isinstance(format, Plan) else None
    formats = given.formats if given is not None else as_candidates(format)
    if not 0 <= anchor <= 1:
        raise IsogridError(f"anchor is between 0 and 1, got {anchor}")
    if anchor and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError(
            f"anchor={anchor:g} compares two models on data: give calibration batches or texts, or anchor=0"
        )
    if inputs not in ("compressed", "original") or (inputs == "original" and anchor):
        raise IsogridError(
            f"inputs is 'compressed', or without anchor 'original'; got {inputs!r} with anchor={anchor:g}"
        )
    if not 0 <= held_out < 1:
        raise IsogridError(f"held_out is a share in [0, 1) of the calibration rows, got {held_out}")
    if given is None:
        check_allocation(allocate, formats, calibration)
    if (refine is not None or distill is not None) and (calibration is None or isinstance(calibration, Moments)):
        raise IsogridError("refine and distill train on data: give calibration batches or texts")
    refinement = Refinement(minutes=refine) if isinstance(refine, int | float) else refine
    distillation = Distillation(minutes=distill) if isinstance(distill, int | float) else distill
    trains = refinement is not None or distillation is not None
    layers = select_layers(model, select, skip)
    for name, module in layers.items():
        _check_weight(name, module)
    if not (calibration is None or isinstance(calibration, Moments)):
        calibration = as_batches(calibration, tokenizer, length, model=model, training=trains)
    timed: TimedPrices | None = None
    stored = budget if isinstance(budget, Budget) else None
    prices: Prices = StoredPrices(layers, stored)
    if isinstance(budget, Milliseconds) and given is None:
        prices = timed = TimedPrices(model, layers, budget, calibration if isinstance(calibration, list) else None)
    progress = None
    if resume is not None:
        if calibration is None or isinstance(calibration, Moments):
            raise IsogridError("resume keeps blocks that were fitted on data: give calibration batches or texts")
        asked: dict[str, Any] = {"layers": list(layers), "inputs": inputs, "anchor": anchor, "held_out": held_out}
        asked |= {"refine": refinement, "seed": seed, "options": fit_options}
        if given is not None:
            asked["plan"] = {name: str(member) for name, member in given.members.items()}
        else:
            asked |= {"formats": formats, "keep": keep, "budget": stored or str(budget), "allocate": allocate}
        progress = Progress(resume, fingerprint(model, calibration, asked))

    def make_plan() -> Plan:
        if given is not None:
            given.spent(layers)  # a plan of other layers is refused before anything is kept
            return given
        if timed is not None and isinstance(budget, Milliseconds):
            limit, share = timed.limit(budget)
        else:
            limit, share = _limit(prices, keep, stored)
        found = plan(
            model, layers, formats, prices, limit, share, allocate=allocate, calibration=calibration, seed=seed
        )
        return found if timed is None else dataclasses.replace(found, milliseconds=timed.predicted(found.members))

    chosen = make_plan() if progress is None else progress.plan(make_plan)
    by_request = given is None and timed is None
    share = _limit(prices, keep, stored)[1] if by_request else chosen.spent(layers)[1]
    report = CompressionReport(
        formats,
        share,
        predicted_milliseconds=chosen.milliseconds,
        allocation=chosen.allocation,
        predicted_rise=chosen.rise,
        least_rise=chosen.bound,
        dense_model_bytes=stored_bytes(model),
        dense_model_parameters=count_parameters(model),
    )
    if timed is not None and chosen.milliseconds is not None:
        report.predicted_speedup = timed.total / 1e6 / chosen.milliseconds

    def fit(name: str, metric: Metric | None, seen: Seen | None = None) -> StructuredLinear:
        member = chosen.members[name]
        options = {} if isinstance(member, Dense) else fit_options  # a layer left dense has nothing to solve
        new, layer_report = fit_layer(name, layers[name], member, metric, _source(name, seed), options, anchor, seen)
        report.layers.append(layer_report)
        if on_layer is not None:
            on_layer(layer_report)
        return new

    vectors = _vectors(model) if trains or progress is not None else {}
    teacher = original_view(model) if distillation is not None else None
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
            visit = InOrder(fit, calibration, anchored=anchor > 0, original=inputs == "original", held_out=held_out)
            compared = anchor > 0 or inputs == "original"
            with evaluation_mode(model):
                if refinement is None and progress is None:
                    fit_in_order(model, layers, calibration, visit, anchored=compared)
                else:
                    report.blocks = ByBlocks(
                        model,
                        layers,
                        calibration,
                        visit,
                        report.layers,
                        refinement,
                        anchored=compared,
                        seed=seed,
                        progress=progress,
                        on_block=on_block,
                    ).run()
            if not report.layers:
                raise IsogridError(f"calibration reaches none of the {len(layers)} selected layers; check its form")
            for name in [name for name in layers if name not in {done.name for done in report.layers}]:
                model.set_submodule(name, fit(name, None))
            visit.forget()
            if teacher is not None and distillation is not None:
                with evaluation_mode(teacher), evaluation_mode(model):
                    report.distilled = distill_model(model, teacher, calibration, distillation, seed=seed)
            report.calibration = f"{_rows(report)} rows, inputs of the "
            report.calibration += "compressed part" if inputs == "compressed" else "original model"
        report.model_bytes, report.model_parameters = stored_bytes(model), count_parameters(model)
        if timed is not None:
            report.milliseconds = measured_beside_dense(model, layers, timed.inputs, timed.repeats)
        report.warnings = _warnings(report)
        for message in report.warnings:  # inside: a caller's filter may make them errors
            warnings.warn(message, IsogridWarning, stacklevel=2)
        for name in layers:
            limit_memory(model.get_submodule(name), memory)
        mark_structured(model, formats[0] if len(formats) == 1 else None)
    except BaseException:
        for name, module in layers.items():
            model.set_submodule(name, module)
        with torch.no_grad():
            for name, value in vectors.items():
                model.get_parameter(name).copy_(value)
        raise
    report.seconds = time.perf_counter() - begun
    return report


def _source(name: str, seed: int) -> torch.Generator:
    """Each layer's own randomness: a compression that goes on draws the same as one that never stopped."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    """What refinement may change beside the layers: gains and biases, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.ndim <= 1}


def _rows(report: CompressionReport) -> int:
    return max((layer.rows or 0 for layer in report.layers), default=0)


def as_candidates(format: Any) -> tuple[Format, ...]:
    """One format or several, from a format, a name, a description, a list of these, or "auto".

    Raises:
        IsogridError: not formats, none, or one whose size is given: the budget chooses sizes.
    """
    if isinstance(format, str) and format.strip() == "auto":
        format = AUTO
    several = isinstance(format, Iterable) and not isinstance(format, str | Mapping)
    found = tuple(dict.fromkeys(as_format(one) for one in (format if several else [format])))
    if not found:
        raise IsogridError("compress needs a format; 'auto' chooses from " + ", ".join(AUTO))
    for one in found:
        refuse_explicit_sizes(one)
    return found


def _limit(prices: Prices, keep: float, budget: Budget | None) -> tuple[int, float]:
    """The limit over all layers, and the share of their dense cost that it is."""
    dense = prices.whole()
    if budget is None:
        check_keep(keep)
        return math.floor(keep * dense * (1 + 1e-12)), keep
    if not 0 < budget.limit < dense:
        raise IsogridError(f"the budget is {budget}; the selected matrices take {dense} of that: give less, above 0")
    return budget.limit, budget.limit / dense


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
    judged = [(one, one.held_error) for one in report.layers if one.held_error is not None]
    learnt = [(one, held) for one, held in judged if held > max(OVERFITTED * one.known_error, one.known_error + 0.02)]
    if learnt and not few:
        worst, error = max(learnt, key=lambda one: one[1] - one[0].known_error)
        out.append(
            f"{len(learnt)} layers fit their calibration rows much better than held-out ones, the worst {worst.name!r} "
            f"({worst.known_error:.3f} and {error:.3f}): give more windows, or anchor=0"
        )
    return out
