"""``isogrid demo``: the main job, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Data, Json, Quick, Seed


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("demo"),
    windows: Annotated[
        int, typer.Option(min=1, help="Calibration windows, and evaluation windows, of 512 tokens.")
    ] = 16,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Compress the embedded language model in four formats and write a report: the main job, end to end."""
    from isogrid.report import console_table
    from isogrid.studies.demo import run_demo

    def say(message: str) -> None:
        notes.print(plain(message), highlight=False, soft_wrap=True)

    result = run_demo(out, windows=windows, quick=quick, seed=seed, data_dir=data, command=command_line(), say=say)
    if as_json:
        from isogrid.report import read_json

        console.print_json(json.dumps(read_json(out / "data.json"), default=str))
        return
    console.print(console_table(result))
    console.print(f"report: {out / 'report.html'}; models: {out / 'models'}", highlight=False, soft_wrap=True)
