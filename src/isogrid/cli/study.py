"""``isogrid study``: one reproducible experiment."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Data, Quick, Seed
from isogrid.errors import IsogridError


def study(
    name: Annotated[
        str,
        typer.Argument(
            help="image_compression, quality_ladder, random_projection, sentence_encoder or solver_quality."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Default: results/study/NAME.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    part: Annotated[
        str | None, typer.Option(help="Of a study with parts; quality_ladder: formats, steps, stories.")
    ] = None,
    full: Annotated[bool, typer.Option(help="The long setting of a study that has one.")] = False,
) -> None:
    """Run one reproducible experiment and write its table."""
    from isogrid.report import console_table
    from isogrid.studies import STUDIES

    if name not in STUDIES:
        raise IsogridError(f"study {name!r} is unknown; there are: {', '.join(STUDIES)}")

    def say(message: str) -> None:
        notes.print(plain(message), highlight=False, soft_wrap=True)

    chosen: dict[str, Any] = {"part": part} if part is not None else {}
    chosen |= {"full": True} if full else {}
    for option in chosen:
        if option not in inspect.signature(STUDIES[name]).parameters:
            raise IsogridError(f"study {name} has no --{option}; leave it out")
    target = out or Path("results/study") / name
    result = STUDIES[name](target, quick=quick, seed=seed, data_dir=data, command=command_line(), say=say, **chosen)
    for table in [result] if "rows" in result else result.values():  # one table, or several by name
        if "dense" in table:
            console.print(console_table(table))
        else:
            console.print((target / "table.md").read_text(), highlight=False, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True)
