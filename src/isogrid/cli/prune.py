"""``isogrid prune``: a model as fast as it is asked to be, with fewer heads and channels."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Data, Json, Model, Quick, Seed
from isogrid.errors import IsogridError, IsogridWarning


def prune(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(help="Folder for the pruned model; for several speedups a folder with one for each: 1.5x, 2x."),
    ],
    speedup: Annotated[
        list[float] | None,
        typer.Option(help="Of a pass of the whole model here, above 1; several times. Default: 1.5."),
    ] = None,
    calibrate: Annotated[
        str, typer.Option(help="Calibration: wikitext2:calibration, pydoc, sts:train, photographs, a text file.")
    ] = "pydoc",
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows of --length tokens; an encoder takes 8 paragraphs for each.")
    ] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the pass whose time counts.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row of that pass; 1: a step of decoding. Default: --length.")
    ] = None,
    gradual: Annotated[
        float | None,
        typer.Option(help="Minutes of distillation after each speedup; each model comes from the one before."),
    ] = None,
    train: Annotated[
        float | None, typer.Option(help="Minutes of distillation of each model, all from the dense one.")
    ] = None,
    allocate: Annotated[
        str,
        typer.Option(
            help="search: the model is asked what its modules are worth; errors: by their own errors; uniform: the "
            "same share of all."
        ),
    ] = "search",
    criterion: Annotated[
        str, typer.Option(help="obs: the rest is refitted; magnitude: by the size of weights.")
    ] = "obs",
    trials: Annotated[int, typer.Option(min=0, help="Sets of sizes that the search judges beyond the first.")] = 32,
    bias: Annotated[bool, typer.Option(help="Layers may gain a bias that takes up the mean of what is lost.")] = True,
    select: Annotated[
        list[str] | None, typer.Option(help="Modules: attention, feed_forward, '*.0.*'; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each kind.")] = 9,
    fresh: Annotated[bool, typer.Option(help="Measure times anew.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Remove heads, channels and whole modules until the model is as fast as asked for, measured on this machine.

    Started by ``accelerate launch`` or ``torchrun``, several processes share the training.
    """
    from torch import Tensor

    from isogrid.checkpoint import check_place, save
    from isogrid.cli.source import open_model
    from isogrid.compress.structured_pruning import How, prune_family
    from isogrid.compress.team import launched
    from isogrid.evaluation import peak_memory_bytes
    from isogrid.report import format_bytes, format_duration, write_json
    from isogrid.studies.subjects import calibration_data, timed_inputs

    if gradual is not None and train is not None:
        raise IsogridError("--gradual trains each step already; leave --train out")
    speedups = sorted(set(speedup or [1.5]))
    places = {one: out if len(speedups) == 1 else out / f"{one:g}x" for one in speedups}
    for place in places.values():
        check_place(place)  # before the work, not after it
        if Path(model).is_dir() and place.resolve() == Path(model).resolve():
            raise IsogridError(f"--out {place} is the model itself; give another folder")
    if calibrate.endswith(":evaluation"):
        warnings.warn(
            f"{calibrate} is what evaluate measures on; its figures will flatter", IsogridWarning, stacklevel=1
        )
    accelerator = launched()
    leads = accelerator is None or accelerator.is_main_process
    loaded, tokenizer = open_model(model, dtype=dtype)
    if accelerator is not None:
        loaded = loaded.to(accelerator.device)
    windows, trials = (min(windows, 8), min(trials, 4)) if quick else (windows, trials)
    found: Any = calibration_data(calibrate, loaded, tokenizer, windows=windows, length=length, data_dir=data)
    inputs = timed_inputs(loaded, tokens or length, batch)
    if inputs is None and isinstance(found, Tensor):  # pictures
        if len(found) < batch:
            raise IsogridError(
                f"--batch {batch} is timed on calibration data, which has {len(found)}; give --windows more"
            )
        inputs = found[:batch]
    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    family = prune_family(
        loaded,
        found,
        speedups=speedups,
        gradual=gradual is not None,
        allocate=allocate,
        trials=trials,
        train=train if gradual is None else gradual,
        in_place=gradual is not None or len(speedups) == 1,
        inputs=inputs,
        tokenizer=tokenizer,
        length=length,
        how=How(criterion=criterion, bias=bias),
        select=select,
        repeats=repeats,
        cached=not fresh,
        seed=seed,
        accelerator=accelerator,
        say=lambda what: notes.print(plain(what), highlight=False, soft_wrap=True) if leads else None,
    )
    for pruned, report in family:
        place = places[report.speedup]
        if not leads:
            continue
        report.calibration = f"{calibrate}, {report.calibration}"
        save(pruned, place, tokenizer=tokenizer)
        described = report.to_dict() | {"model": model, "command": command_line(), "peak_memory": peak_memory_bytes()}
        write_json(described, place / "pruning.json")
        rows.append(described | {"folder": str(place)})
        if not as_json:
            console.print(str(report), highlight=False, soft_wrap=True)
            console.print(
                f"{format_bytes(report.bytes)} of {format_bytes(report.dense_bytes)}; written to {place}; "
                f"next: isogrid evaluate {place} --against {model}",
                highlight=False,
                soft_wrap=True,
            )
    if not leads:
        return
    if as_json:
        console.print_json(json.dumps(rows, default=str))
        return
    console.print(
        f"{format_duration(time.perf_counter() - begun)}; peak memory {format_bytes(peak_memory_bytes())}",
        highlight=False,
    )
