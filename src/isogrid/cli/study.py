"""``isogrid study``: one reproducible experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Data, Quick, Seed
from isogrid.errors import IsogridError


def study(
    name: Annotated[
        str, typer.Argument(help="image_compression, random_projection, sentence_encoder or solver_quality.")
    ],
    out: Annotated[Path | None, typer.Option(help="Default: results/study/NAME.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
) -> None:
    """Run one reproducible experiment and write its table."""
    from isogrid.report import console_table
    from isogrid.studies import STUDIES

    if name not in STUDIES:
        raise IsogridError(f"study {name!r} is unknown; there are: {', '.join(STUDIES)}")

    def say(message: str) -> None:
        notes.print(plain(message), highlight=False, soft_wrap=True)

    target = out or Path("results/study") / name
    result = STUDIES[name](target, quick=quick, seed=seed, data_dir=data, command=command_line(), say=say)
    for table in [result] if "rows" in result else result.values():  # one table, or several by name
        if "dense" in table:
            console.print(console_table(table))
        else:
            console.print((target / "table.md").read_text(), highlight=False, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True)
