"""``isogrid report``: pages from stored numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isogrid.cli.console import console
from isogrid.errors import IsogridError


def report(
    folder: Annotated[Path, typer.Argument(help="A folder with data.json, or a model that compress wrote.")],
) -> None:
    """Draw the report page and pictures of a table, or of one compressed model, from its stored numbers."""
    from isogrid.report import read_json, write_report

    if (folder / "data.json").is_file():
        written = write_report(read_json(folder / "data.json"), folder)
    elif (folder / "compression.json").is_file():
        from isogrid.studies.rows import page_of_compression

        page = folder.with_name(folder.name + "-report")  # beside the model: a checkpoint folder holds nothing else

        kept = folder / "evaluation.json"
        evaluated = read_json(kept) if kept.is_file() else None
        written = write_report(page_of_compression(read_json(folder / "compression.json"), evaluated), page)
    else:
        raise IsogridError(f"{folder} has neither data.json nor compression.json; give a folder that a command wrote")
    console.print(f"report: {written['report.html']}", highlight=False, soft_wrap=True)
