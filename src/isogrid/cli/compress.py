"""``isogrid compress``: a model's matrices in a format."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import command_line, console, notes
from isogrid.cli.options import Data, Json, Model, Quick, Seed
from isogrid.errors import IsogridError, IsogridWarning


def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the compressed model; an earlier one there is replaced.")],
    format: Annotated[str, typer.Option(help="A format: low_rank_light, monarch, 'monarch(blocks=8)', …")] = (
        "low_rank_light"
    ),
    keep: Annotated[float, typer.Option(help="Fraction of the selected parameters to keep, in (0, 1).")] = 0.6,
    calibrate: Annotated[
        str | None, typer.Option(help="Calibration: wikitext2:calibration, pydoc, sts:train, photographs, a text file.")
    ] = None,
    anchor: Annotated[
        float,
        typer.Option(
            help="0: each layer keeps its matrix; 1: it aims at the original model's outputs. With --calibrate."
        ),
    ] = 0.0,
    allocate: Annotated[
        str, typer.Option(help="uniform: every layer the same share; global: one budget, spent by sensitivity.")
    ] = "uniform",
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows of --length tokens; an encoder takes 8 paragraphs for each.")
    ] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    select: Annotated[list[str] | None, typer.Option(help="Layers to rewrite: q_proj, '*.mlp.*'; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    export: Annotated[str, typer.Option(help="structured, or dense: multiply the factors out again.")] = "structured",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model's matrices in a format and save it in Hugging Face form."""
    from isogrid import compress as compress_model
    from isogrid.checkpoint import check_place, save
    from isogrid.cli.source import calibration_data, open_model
    from isogrid.compress import allocate_uniform, as_batches, estimate_seconds, select_layers
    from isogrid.evaluation import peak_memory_bytes
    from isogrid.formats import as_format
    from isogrid.report import format_bytes, format_duration, progress, write_json

    if export not in ("structured", "dense"):
        raise IsogridError(f"--export is structured or dense, got {export!r}")
    fmt = as_format(format)
    check_place(out)  # before the work, not after it
    if Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise IsogridError(f"--out {out} is the model itself; give another folder")
    loaded, tokenizer = open_model(model, dtype=dtype)
    layers = select_layers(loaded, select, skip or ())
    sized = allocate_uniform(layers, fmt, keep)
    calibration: Any = None
    tokens = 0
    if calibrate is not None and calibrate.endswith(":evaluation"):
        warnings.warn(
            f"{calibrate} is what evaluate measures on; its figures will flatter", IsogridWarning, stacklevel=1
        )
    if calibrate is not None:
        windows = min(windows, 4) if quick else windows
        found = calibration_data(calibrate, loaded, tokenizer, windows=windows, length=length, data_dir=data)
        calibration = as_batches(found, tokenizer, length)
        # A sentence or an image patch row counts for about 32 tokens: good enough for an estimate.
        tokens = 32 * len(found) if isinstance(found, list) or found.ndim != 2 else found.numel()
    estimate = estimate_seconds(layers, sized, calibration_tokens=tokens)
    notes.print(f"{len(layers)} layers as {fmt.label()}; about {format_duration(estimate)}", highlight=False)
    begun = time.perf_counter()
    with progress("Compressing", len(layers)) as step:
        report = compress_model(
            loaded,
            fmt,
            keep=keep,
            calibration=calibration,
            select=select,
            skip=skip or (),
            anchor=anchor,
            allocate=allocate,
            seed=seed,
            on_layer=lambda layer: step(layer.name),
        )
    if calibrate is not None:
        report.calibration = f"{calibrate}, {report.calibration}"
    save(loaded, out, tokenizer=tokenizer, dense=export == "dense")
    if export == "dense":  # the factors are multiplied out again: the file is as large as the dense model's
        report.model_bytes, report.model_parameters = report.dense_model_bytes, report.dense_model_parameters
    seconds, peak = time.perf_counter() - begun, peak_memory_bytes()
    described = report.to_dict() | {
        "model": model,
        "command": command_line(),
        "peak_memory": peak,
        "estimate": estimate,
    }
    write_json(described, out / "compression.json")
    if as_json:
        console.print_json(json.dumps(described, default=str))
        return
    console.print(str(report), highlight=False, soft_wrap=True)
    console.print(
        f"requested keep {report.requested_keep:g}, achieved {report.achieved_keep:.4f}; tensors on disk "
        f"{format_bytes(report.model_bytes)} ({report.model_bytes} bytes); with saving {format_duration(seconds)}; "
        f"peak memory {format_bytes(peak)}",
        highlight=False,
        soft_wrap=True,
    )
    if calibrate is None:
        console.print("plain fits; --calibrate pydoc usually gives a much better model", soft_wrap=True)
    console.print(f"written to {out}; next: isogrid evaluate {out}", highlight=False, soft_wrap=True)
