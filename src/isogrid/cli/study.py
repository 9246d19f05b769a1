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
        str,
        typer.Argument(help="A name of isogrid.studies: image_compression, quality_ladder, sst2_finetuning, …"),
    ],
    out: Annotated[Path | None, typer.Option(help="Default: results/study/NAME.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    part: Annotated[
        str | None,
        typer.Option(
            help="Of a study with parts; quality_ladder: formats, steps, stories, auto, welore; "
            "trit_quality: encoder, stories, smollm; structured_pruning: encoder, decoder."
        ),
    ] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the parameters kept, of quality_ladder.")] = None,
    full: Annotated[bool, typer.Option(help="The long setting of a study that has one.")] = False,
    method: Annotated[list[str] | None, typer.Option(help="A method of the study; repeatable.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="A rank of the study; repeatable.")] = None,
    imdb: Annotated[Path | None, typer.Option(help="A folder with IMDB, for sst2_finetuning.")] = None,
) -> None:
    """Run one reproducible experiment and write its table."""
    from isogrid.cli.studies import study_options
    from isogrid.report import console_table
    from isogrid.studies import STUDIES

    if name not in STUDIES:
        raise IsogridError(f"study {name!r} is unknown; there are: {', '.join(STUDIES)}")

    def say(message: str) -> None:
        notes.print(plain(message), highlight=False, soft_wrap=True)

    given = {"part": part, "keep": keep, "full": full, "methods": method, "ranks": rank, "imdb": imdb}
    chosen = study_options(name, STUDIES[name], given)
    target = out or Path("results/study") / name
    result = STUDIES[name](target, quick=quick, seed=seed, data_dir=data, command=command_line(), say=say, **chosen)
    for table in [result] if "rows" in result else result.values():  # one table, or several by name
        if "dense" in table:
            console.print(console_table(table))
        else:
            console.print((target / "table.md").read_text(), highlight=False, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True)
