"""Methods beside each other on one model: bytes, parameters, time of a pass, quality, minutes, memory.

A method is a format under a budget, a format of a fixed size, structured pruning to a speedup, or a stack of such
steps; each is applied to a fresh copy of the dense model, calibrated on the same data and measured by the same
yardstick.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isogrid.compress import (
    CompressionReport,
    Plan,
    compress,
    count_parameters,
    dense_parameters,
    select_layers,
    stored_bytes,
    structured_layers,
)
from isogrid.compress.milliseconds import measured_together
from isogrid.compress.structured_pruning import How, PruningReport, prune
from isogrid.errors import IsogridError
from isogrid.evaluation import forget_peak_memory, peak_memory_bytes
from isogrid.formats import Budget
from isogrid.linear import linear_matrix
from isogrid.report import format_keep, write_report
from isogrid.studies.rows import Say, fingerprint, gap, heading, remembered
from isogrid.studies.stacks import Method, Step, as_formats, as_method
from isogrid.studies.subjects import Yardstick, figure_of


def run_comparison(
    out: Path,
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    methods: Sequence[str | Method],
    keep: float = 0.5,
    in_bytes: bool = True,
    calibration: Any = None,
    calibrated_on: str = "",
    yardstick: Yardstick | None = None,
    inputs: Any = None,
    repeats: int = 31,
    seed: int = 0,
    command: str = "isogrid compare",
    say: Say = print,
) -> dict[str, Any]:
    """Apply each method to a copy of a model and measure what comes of it.

    Args:
        out: folder of the table, the page, and a picture of quality against size. Rows are kept in ``runs/compare``.
        model: dense, in eval mode; left as it is.
        tokenizer: of it, or None.
        name: of the model.
        methods: see `stacks`.
        keep: fraction of the selected matrices' bytes, for formats whose size is open.
        in_bytes: False: of their parameters.
        calibration: see `compress`; None: plain fits.
        calibrated_on: the same in words.
        yardstick: how quality is measured.
        inputs: one batch whose pass is timed; None: times are not measured, and steps that prune are to be fast on the
            first row of the calibration data.
        repeats: timed passes of each model, in turns with the dense one.
        seed: of fits.
        command: for the page.
        say: told each row.

    Returns:
        The data of the table.

    Raises:
        IsogridError: a method can't be read, or can't be applied: names it.
    """
    asked = [as_method(one) if isinstance(one, str) else one for one in methods]
    _check(asked, model, calibration)
    yardstick = yardstick or Yardstick()
    dense_layers = select_layers(model)
    settings: dict[str, Any] = {
        "model": name,
        "calibration": calibrated_on or "none: plain fits",
        "yardstick": {key: str(value) for key, value in vars(yardstick).items()},
        "keep": f"{keep:g} of the {'bytes' if in_bytes else 'parameters'} of the selected matrices",
        "repeats": repeats,
        "inputs": None if inputs is None else str(getattr(inputs, "shape", type(inputs).__name__)),
        "seed": seed,
    }
    runs = Path("runs/compare") / name.replace("/", "_")
    # A folder or a file of the same name may hold something else by now.
    known = {"weights": fingerprint(model), "data": fingerprint(calibration), "threads": torch.get_num_threads()}
    dense_measured = remembered(runs, "dense", settings | known, lambda: yardstick.measure(model, tokenizer, name))
    figure, dense_value, better = figure_of(dense_measured)
    dense: dict[str, Any] = {
        "label": "Dense",
        "format": "dense",
        "achieved_keep": 1.0,
        "parameters": dense_parameters(dense_layers),
        "bytes": stored_bytes(model),
        "quality": dense_value,
    }
    say(f"dense: {figure} {dense_value:.4g}")

    def row(method: Method) -> dict[str, Any]:
        forget_peak_memory()
        smaller = copy.deepcopy(model)
        seconds, warnings = 0.0, []
        predicted = 1.0
        for number, step in enumerate(method.steps):
            try:
                report: CompressionReport | PruningReport
                if step.speedup is None:
                    report = _apply(step, smaller, model, keep, in_bytes, calibration, tokenizer, seed)
                else:
                    report = pruning = _prune(step, smaller, inputs, calibration, tokenizer, seed)
                    predicted *= pruning.predicted
            except IsogridError as error:
                raise IsogridError(f"{method.label}, step {number + 1}: {error}") from error
            seconds += report.seconds
            warnings += report.warnings
        peak = peak_memory_bytes()
        _, value, _ = figure_of(yardstick.measure(smaller, tokenizer, name))
        found = {
            "label": method.label,
            "format": method.steps[-1].format or "dense, pruned",
            "calibrated": calibration is not None,
            "requested_keep": None if all(step.speedup is not None for step in method.steps) else keep,
            "achieved_keep": _stored(smaller, dense_layers) / _stored(model, dense_layers),
            "parameters": count_parameters(smaller) - count_parameters(model) + dense["parameters"],
            "bytes": stored_bytes(smaller),
            "quality": value,
            "seconds": seconds,
            "peak_memory": peak,
            "warnings": warnings,
        }
        if all(step.speedup is not None for step in method.steps):
            found["predicted_speedup"] = predicted
        if figure == "perplexity":
            found["gap"] = gap(value, dense_value)
        if inputs is not None:
            times = measured_together({"dense": model, "smaller": smaller}, inputs, repeats)
            found["latency_ms"] = times["smaller"].median
            found["latency_ratio"] = times["dense"].median / times["smaller"].median
        return found

    rows = []
    for method in asked:
        described = settings | known | {"steps": [dataclasses.asdict(step) for step in method.steps]}
        rows.append(remembered(runs, method.label.replace("/", "_"), described, partial(row, method)))
        last = rows[-1]
        say(f"{method.label}: {last['bytes'] / 1e6:.4g} MB, {figure} {last['quality']:.4g}, {last['seconds']:.0f} s")
    title = f"Methods on {name} at {format_keep(keep)} of the {'bytes' if in_bytes else 'parameters'}"
    result = {
        **heading(title, command, settings, model=name),
        "quality": {"name": figure, "better": better},
        "size": "bytes",
        "dense": dense,
        "rows": rows,
        "notes": [
            "Keep achieved: share of the selected matrices' bytes as stored, codes, masks and scales included.",
            "Speed: time of a pass of the dense model over this one's, measured in turns.",
            "A format of a fixed size takes what it takes, pruning what its speedup leaves; others get the budget.",
        ],
    }
    write_report(result, out)
    return result


def _check(methods: Sequence[Method], model: nn.Module, calibration: Any) -> None:
    """What can be known to fail before any work."""
    for method in methods:
        for number, step in enumerate(method.steps):
            try:
                if step.speedup is None:
                    select_layers(model, **step.patterns)
                elif calibration is None:
                    raise IsogridError(
                        "pruning to a speedup measures what structures are worth on data; give calibration"
                    )
            except IsogridError as error:
                raise IsogridError(f"{method.label}, step {number + 1}: {error}") from error


def _apply(
    step: Step,
    model: nn.Module,
    original: nn.Module,
    keep: float,
    in_bytes: bool,
    calibration: Any,
    tokenizer: Any,
    seed: int,
) -> CompressionReport:
    layers = select_layers(model, **step.patterns)
    written = structured_layers(model)
    dense = {name: one for name, one in select_layers(original, **step.patterns).items() if name not in written}
    options: dict[str, Any] = {"calibration": calibration, "tokenizer": tokenizer, "seed": seed, **dict(step.options)}
    formats = as_formats(step.format)
    if step.fixed:
        assert not isinstance(formats, str)
        return compress(model, Plan(dict.fromkeys(layers, formats[0]), tuple(formats)), **options)
    if step.keep is not None or (step.bytes is None and not in_bytes):
        share = keep if step.keep is None else step.keep
        left = dense_parameters(layers) / dense_parameters(dense)
        if left <= share:
            raise IsogridError(f"{left:.3f} of the parameters are left before it; keep {share:g} is not smaller")
        return compress(model, formats, keep=share / left, **options)
    share = keep if step.bytes is None else step.bytes
    matrices = [linear_matrix(layer) for layer in dense.values()]
    dtype = max((matrix.dtype for matrix in matrices), key=lambda one: one.itemsize)
    whole = sum(matrix.numel() * dtype.itemsize for matrix in matrices)
    return compress(model, formats, budget=Budget(bytes=int(share * whole), dtype=dtype), **options)


def _prune(step: Step, model: nn.Module, inputs: Any, calibration: Any, tokenizer: Any, seed: int) -> PruningReport:
    assert step.speedup is not None
    options = dict(step.options)
    how = How(**{key: options.pop(key) for key in ("criterion", "bias") if key in options})
    return prune(
        model, calibration, speedup=step.speedup, inputs=inputs, tokenizer=tokenizer, how=how, seed=seed, **options
    )


def _stored(model: nn.Module, names: Mapping[str, nn.Module]) -> int:
    """Bytes of the selected matrices, in whatever form they are."""
    structured, known = structured_layers(model), dict(model.named_modules())
    total = 0
    for name in names:
        if name in structured:
            total += sum(value.nbytes for value in structured[name].factors.values())
        elif name in known:  # of a module that was pruned away nothing is left
            total += linear_matrix(known[name]).nbytes
    return total
