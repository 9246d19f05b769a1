"""``isogrid formats``: what formats there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from isogrid.cli.console import console, plain
from isogrid.cli.options import Json


def formats(
    name: Annotated[
        str | None, typer.Argument(help="Show one in detail: a name, or a label such as 'monarch(blocks=8)'.")
    ] = None,
    out_features: Annotated[int, typer.Option("--out-features", min=1)] = 768,
    in_features: Annotated[int, typer.Option("--in-features", min=1)] = 768,
    keep: Annotated[float, typer.Option(help="Budget of the shown members.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures of the blocks, NAME.png each.")] = None,
    as_json: Json = False,
) -> None:
    """List the formats, or show one: what it is, what its fit guarantees, its largest member within a budget."""
    from isogrid.cli.describe import describe, detail_page, draw, try_small_anatomy
    from isogrid.formats import as_format, registered

    shown = [as_format(name)] if name is not None else [cls() for cls in registered().values()]
    listed = [describe(fmt, out_features, in_features, keep) for fmt in shown]
    if name is not None:
        listed[0]["anatomy"] = try_small_anatomy(shown[0], out_features, in_features, keep, 16)
    if out is not None:
        for fmt, entry in zip(shown, listed, strict=True):
            small = try_small_anatomy(fmt, out_features, in_features, keep, 24)
            entry["picture"] = None if small is None else str(draw(small, out))
    if as_json:
        console.print_json(json.dumps(listed if name is None else listed[0]))
        return
    if name is not None:
        console.print(plain(detail_page(listed[0], console.width)), highlight=False, soft_wrap=True)
    elif out is None:
        console.print(_format_table(listed, out_features, in_features, keep))
    if out is not None:
        for entry in listed:
            drawn = "not drawn" if entry["picture"] is None else entry["picture"]
            console.print(f"{entry['name']}: {drawn}", highlight=False, soft_wrap=True)


def _format_table(listed: list[dict[str, Any]], out_features: int, in_features: int, keep: float) -> Table:
    table = Table(title=f"Formats; members within {keep:g} of {out_features} x {in_features}", title_justify="left")
    for heading in ("format", "what it is", "member", "kept"):
        table.add_column(heading, no_wrap=heading in ("format", "kept"), overflow="fold")
    for entry in listed:
        share = "-" if entry["kept"] is None else f"{entry['kept']:.3f}"
        table.add_row(str(entry["name"]), plain(str(entry["summary"]).replace("``", "")), plain(entry["member"]), share)
    return table
