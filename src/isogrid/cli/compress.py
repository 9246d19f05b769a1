"""``isogrid compress``: a model's matrices in a format."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import command_line, console, notes
from isogrid.cli.options import Data, Json, Model, Quick, Seed
from isogrid.errors import BudgetError, IsogridError, IsogridWarning


def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the compressed model; an earlier one there is replaced.")],
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="A format: low_rank_light (the default), 'monarch(blocks=8)', …; several times, or auto: the best for "
            "each layer."
        ),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the selected parameters to keep, in (0, 1). [default: 0.6]")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--bytes", min=1, help="Instead of --keep: bytes of the selected matrices together.")
    ] = None,
    milliseconds: Annotated[
        float | None,
        typer.Option(help="Instead of --keep: how long a pass of the whole model may take on this machine."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="With --milliseconds: tokens of that pass.")] = 512,
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
        str,
        typer.Option(
            help="uniform: every layer the same share; global: one budget, spent by sensitivity; water_filling: by the "
            "layers' spectra; welore: by WeLore's threshold, without data."
        ),
    ] = "uniform",
    held_out: Annotated[
        float,
        typer.Option(help="Share of the calibration rows that fits don't know: they show what was learnt by heart."),
    ] = 0.0625,
    refine: Annotated[
        float | None,
        typer.Option(help="Minutes of training of the blocks towards the original's outputs; resumes if interrupted."),
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="Minutes of training of the whole model towards the original's predictions.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A file that advise has written; it stands for all options before and after.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows of --length tokens; an encoder takes 8 paragraphs for each.")
    ] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    select: Annotated[list[str] | None, typer.Option(help="Layers to rewrite: q_proj, '*.mlp.*'; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    export: Annotated[str, typer.Option(help="structured, or dense: multiply the factors out again.")] = "structured",
    memory: Annotated[
        str, typer.Option(help="What layers may keep beside their factors when they multiply: fast, or small: nothing.")
    ] = "fast",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model's matrices in a format and save it in Hugging Face form."""
    from isogrid import compress as compress_model
    from isogrid.checkpoint import check_place, save
    from isogrid.cli.source import open_model, widest_dtype
    from isogrid.compress import Milliseconds, Recipe, allocate_uniform, as_candidates, estimate_seconds, select_layers
    from isogrid.evaluation import peak_memory_bytes
    from isogrid.formats import Budget
    from isogrid.linear import check_memory
    from isogrid.report import format_bytes, format_duration, progress, write_json
    from isogrid.studies.subjects import calibration_data, timed_inputs

    if export not in ("structured", "dense"):
        raise IsogridError(f"--export is structured or dense, got {export!r}")
    for option, minutes in (("--refine", refine), ("--distill", distill)):
        if minutes is not None and not 0 < minutes < math.inf:
            raise IsogridError(f"{option} takes a positive number of minutes, got {minutes:g}")
    budgets = {"--keep": keep, "--bytes": max_bytes, "--milliseconds": milliseconds, "--recipe": recipe}
    given = [option for option, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise IsogridError(f"{', '.join(given)} are budgets each: give one of them")
    keep = 0.6 if keep is None else keep
    followed = None if recipe is None else Recipe.read(recipe)
    if followed is not None:
        calibrate, windows, length, seed = followed.told("source", "windows", "length", "seed")
        select, skip = followed.told("select", "skip")
        formats, anchor, quick, held_out = followed.plan.formats, followed.effort.anchor, False, 0.0
        keep = followed.predicted.keep
    else:
        formats = as_candidates(format[0] if format and len(format) == 1 else format or "low_rank_light")
    check_memory(memory)
    check_place(out)  # before the work, not after it
    if Path(model).is_dir() and out.resolve() == Path(model).resolve():
        raise IsogridError(f"--out {out} is the model itself; give another folder")
    loaded, tokenizer = open_model(model, dtype=dtype)
    layers = select_layers(loaded, select, skip or ())
    budget: Budget | Milliseconds | None = None
    if milliseconds is not None:
        budget = Milliseconds(milliseconds, timed_inputs(loaded, rows))
    if max_bytes is not None:
        budget = Budget(bytes=max_bytes, dtype=widest_dtype(loaded))
    calibration: Any = None
    tokens = 0
    if calibrate is not None and calibrate.endswith(":evaluation"):
        warnings.warn(
            f"{calibrate} is what evaluate measures on; its figures will flatter", IsogridWarning, stacklevel=1
        )
    if calibrate is not None:
        windows = min(windows, 4) if quick else windows
        found = calibration_data(calibrate, loaded, tokenizer, windows=windows, length=length, data_dir=data)
        calibration = found
        # A sentence or an image patch row counts for about 32 tokens: good enough for an estimate.
        tokens = 32 * len(found) if isinstance(found, list) or found.ndim != 2 else found.numel()
    trains: dict[str, Any] = {"refine": refine, "distill": distill}
    if followed is not None:
        trains = {"refine": followed.effort.refine, "distill": followed.effort.distill}
    estimate = 60 * ((refine or 0.0) + (distill or 0.0)) if followed is None else followed.predicted.seconds
    for fmt in formats if followed is None else ():  # each candidate is fitted somewhere
        try:
            sized = allocate_uniform(layers, fmt, keep)
        except BudgetError:  # another candidate, or another allocation, may be smaller
            continue
        estimate += estimate_seconds(layers, sized, calibration_tokens=tokens)
    label = " or ".join(fmt.label() for fmt in formats)
    notes.print(f"{len(layers)} layers as {label}; about {format_duration(estimate)}", highlight=False)
    begun = time.perf_counter()
    kept = out.parent / f"{out.name}.blocks"  # an interrupted refinement goes on from here
    with progress("Compressing", len(layers)) as step:
        report = compress_model(
            loaded,
            formats if followed is None else followed.plan,
            keep=keep,
            budget=budget,
            calibration=calibration,
            tokenizer=tokenizer,
            length=length,
            select=select,
            skip=skip or (),
            anchor=anchor,
            allocate=allocate,
            held_out=held_out,
            resume=kept if trains["refine"] is not None else None,
            memory=memory,
            seed=seed,
            on_layer=lambda layer: step(layer.name),
            **trains,
        )
    if calibrate is not None:
        report.calibration = f"{calibrate}, {report.calibration}"
    save(loaded, out, tokenizer=tokenizer, dense=export == "dense")
    if trains["refine"] is not None:
        shutil.rmtree(kept, ignore_errors=True)
    if export == "dense":  # the factors are multiplied out again: the file is as large as the dense model's
        report.model_bytes, report.model_parameters = report.dense_model_bytes, report.dense_model_parameters
    seconds, peak = time.perf_counter() - begun, peak_memory_bytes()
    described = report.to_dict() | {
        "model": model,
        "command": command_line(),
        "peak_memory": peak,
        "estimate": estimate,
        "limit_milliseconds": milliseconds,
        "predicted": None if followed is None else followed.predicted.to_dict(),
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
    if followed is not None:
        said = followed.predicted
        console.print(
            f"predicted keep {said.keep:.4f}, {said.model_bytes} bytes, {format_duration(said.seconds)}, gap "
            f"{said.gap:.3f}; isogrid evaluate {out} --against {model} measures the gap",
            highlight=False,
            soft_wrap=True,
        )
    if calibrate is None:
        console.print("plain fits; --calibrate pydoc usually gives a much better model", soft_wrap=True)
    console.print(f"written to {out}; next: isogrid evaluate {out}", highlight=False, soft_wrap=True)
