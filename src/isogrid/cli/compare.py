"""``isogrid compare``: methods beside each other on one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Data, Json, Model, Quick, Seed
from isogrid.errors import IsogridError

# Where neither methods nor speedups nor bits are asked for.
DEFAULT = ("low_rank", "low_rank_light", "blast", "monarch")


def compare(
    model: Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A format (low_rank_light, 'blast(blocks=4)', auto), one of a given size ('low_rank(rank=64)'), "
            "or a JSON file with a stack of steps; repeatable. Default: " + ", ".join(DEFAULT) + "."
        ),
    ] = None,
    keep: Annotated[float, typer.Option(help="Fraction of the selected matrices' bytes, in (0, 1).")] = 0.5,
    speedup: Annotated[
        list[float] | None,
        typer.Option(help="A row of structured pruning to this speedup of the timed pass, above 1; repeatable."),
    ] = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(min=1, max=8, help="A row of quantization to so many bits, whatever --keep; repeatable."),
    ] = None,
    parameters: Annotated[bool, typer.Option(help="--keep is a fraction of the parameters, not of the bytes.")] = False,
    calibrate: Annotated[
        str | None, typer.Option(help="Calibration: wikitext2:calibration, pydoc, sts:train, photographs, a text file.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows of --length tokens.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    metric: Annotated[str, typer.Option(help="auto, perplexity, sts or heatmap.")] = "auto",
    rows: Annotated[int, typer.Option(min=1, help="Tokens of the pass that is timed.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Default: results/compare/MODEL.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Compress copies of a model by several methods and measure them: size, time, quality, minutes, memory."""
    from isogrid.cli.source import open_model
    from isogrid.report import console_table
    from isogrid.studies.comparison import run_comparison
    from isogrid.studies.stacks import pruned_to
    from isogrid.studies.subjects import Yardstick, calibration_data, timed_inputs

    if not 0 < keep < 1:
        raise IsogridError(f"--keep is a fraction in (0, 1), got {keep:g}")
    if speedup and calibrate is None:
        raise IsogridError("--speedup measures what structures are worth on data; give --calibrate")
    loaded, tokenizer = open_model(model)
    calibration: Any = None
    count = min(windows, 4) if quick else windows
    if calibrate is not None:
        calibration = calibration_data(calibrate, loaded, tokenizer, windows=count, length=length, data_dir=data)
    inputs = timed_inputs(loaded, rows)
    if inputs is None and hasattr(calibration, "shape"):
        inputs = calibration[:1]
    target = out or Path("results/compare") / Path(model).name
    asked = [*(method or ()), *(f"quantized(bits={one})" for one in bits or ()), *map(pruned_to, speedup or ())]
    result = run_comparison(
        target,
        loaded,
        tokenizer,
        model,
        methods=asked or DEFAULT,
        keep=keep,
        in_bytes=not parameters,
        calibration=calibration,
        calibrated_on="" if calibrate is None else f"{calibrate}, {count} windows of {length} tokens",
        yardstick=Yardstick(metric, windows=4 if quick else 32, data_dir=data),
        inputs=inputs,
        repeats=5 if quick else 31,
        seed=seed,
        command=command_line(),
        say=lambda message: notes.print(plain(message), highlight=False, soft_wrap=True),
    )
    if as_json:
        console.print_json(json.dumps(result, default=str))
        return
    console.print(console_table(result))
    console.print(f"written to {target}", highlight=False, soft_wrap=True)
