"""Compression tables for a terminal and for Markdown, of the data described in `isogrid.report.rows`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rich import box
from rich.table import Table
from rich.text import Text

from isogrid.report.numbers import (
    ABSENT,
    format_bytes,
    format_count,
    format_duration,
    format_gap,
    format_keep,
    format_milliseconds,
    format_percent,
    format_quality,
    format_ratio,
    plain,
)
from isogrid.report.rows import (
    Data,
    Layer,
    Row,
    all_rows,
    best_rows,
    lower_is_better,
    over_budget,
    quality_name,
    warnings_of,
)

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Columns: what a table shows, once for terminal, Markdown and page


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table.

    Attributes:
        title: its head.
        text: the cell of a row.
        align: "right" for numbers.
        wide: shown only where there is room: in Markdown and on the page, not in a terminal.
    """

    title: str
    text: Callable[[T], str]
    align: Literal["left", "right"] = "right"
    wide: bool = False


def table_columns(data: Data) -> list[Column[Row]]:
    """The columns of a compression table, less those in which no row has a value.

    Requested and achieved keep stand side by side, because a format's sizes come in steps and a row may keep less than
    it was allowed; "(over)" marks one that keeps more.
    """
    rows = all_rows(data)
    better = "↓" if lower_is_better(data) else "↑"

    def calibrated(row: Row) -> str:
        value = None if row.get("format") == "dense" else row.get("calibrated")
        return ABSENT if value is None else "yes" if value else "no"

    def achieved(row: Row) -> str:
        return format_percent(row.get("achieved_keep")) + (" (over)" if over_budget(row) else "")

    other = capitalized(str((data.get("other_quality") or {}).get("name") or "other quality"))
    # Where the labels are just the formats' names, a second column of them says nothing.
    spelled = all(_words(row.get("format", "")) in ("", _words(row["label"])) for row in rows[1:])
    # A rung says whether it is calibrated, and all of one ladder ask for one size.
    climbs = any(row.get("rung") for row in rows)
    columns: list[tuple[str, Column[Row]]] = [
        ("label", Column("Matrices", lambda row: str(row["label"]), "left")),
        ("" if spelled else "format", Column("Format", lambda row: str(row.get("format", ABSENT)), "left", wide=True)),
        ("rung", Column("Rung", lambda row: str(row.get("rung", ABSENT)), "left")),
        ("calibrated", Column("Calibrated", calibrated, "left", wide=climbs)),
        (
            "quality",
            Column(f"{capitalized(quality_name(data))} {better}", lambda row: format_quality(row.get("quality"))),
        ),
        ("other_quality", Column(f"{other} {better}", lambda row: format_quality(row.get("other_quality")))),
        ("reference", Column("Published", lambda row: format_quality(row.get("reference")))),
        ("requested_keep", Column("Keep asked", lambda row: format_keep(row.get("requested_keep")), wide=climbs)),
        ("achieved_keep", Column("Keep achieved", achieved)),
        ("parameters", Column("Parameters", lambda row: format_count(row.get("parameters")), wide=True)),
        ("bytes", Column("Size", lambda row: format_bytes(row.get("bytes")))),
        ("gap", Column("Gap", lambda row: format_gap(row.get("gap")))),
        ("latency_ms", Column("Latency", lambda row: format_milliseconds(row.get("latency_ms")), wide=True)),
        (
            "requested_speedup",
            Column("Speed asked", lambda row: format_ratio(row.get("requested_speedup"))),
        ),
        (
            "predicted_speedup",
            Column("Speed predicted", lambda row: format_ratio(row.get("predicted_speedup"))),
        ),
        ("latency_ratio", Column("Speed", lambda row: format_ratio(row.get("latency_ratio")))),
        ("seconds", Column("Time", lambda row: format_duration(row.get("seconds")))),
        ("peak_memory", Column("Peak memory", lambda row: format_bytes(row.get("peak_memory")), wide=True)),
    ]
    return [column for key, column in columns if any(row.get(key) is not None for row in rows)]


def table_legend(data: Data, *, wide: bool = True) -> str:
    """What the columns of this table mean, in one line; ``wide=False`` for a terminal's fewer columns."""
    shown = {column.title for column in table_columns(data) if wide or not column.wide}
    better = "↓: lower is better" if lower_is_better(data) else "↑: higher is better"
    said = [
        ("Keep achieved", "Keep: share of the selected matrices' parameters, asked for and achieved"),
        ("Parameters", "Parameters: of the selected matrices"),
        ("Size", "Size: the whole model's tensors"),
        (f"{capitalized(quality_name(data))} {better[0]}", better),
        ("Gap", "Gap: log(perplexity) − log(dense perplexity)" if quality_name(data) == "perplexity" else ""),
        ("Speed", "Speed: dense time over this time"),
        ("Speed predicted", "Speed predicted: by times of modules, measured before"),
        ("Time", "Time: of the compression"),
    ]
    parts = [text for title, text in said if title in shown and text]
    if any(best_rows(data).values()):
        parts.append("Bold: the best row at that keep")
    return ". ".join(parts) + "."


def layer_columns(layers: Sequence[Layer]) -> list[Column[Layer]]:
    """The columns of a table of layers.

    "Least possible" is the certificate of a fit: no member of its format has a smaller error. "Held out" is the error
    on rows that the fit didn't know. Each is left out where no layer has it.
    """

    def shape(layer: Layer) -> str:
        sizes = layer.get("out"), layer.get("in")
        return ABSENT if None in sizes else "{} × {}".format(*sizes)

    known = [
        ("name", Column("Layer", lambda layer: str(layer.get("name", ABSENT)), "left")),
        ("name", Column("Format", lambda layer: str(layer.get("format", ABSENT)), "left")),
        ("name", Column("Out\u00a0×\u00a0in", shape)),
        ("name", Column("Parameters", lambda layer: format_count(layer.get("parameters")))),
        ("name", Column("Of dense", lambda layer: format_percent(_kept([layer])))),
        ("name", Column("Relative error", lambda layer: format_quality(layer.get("error")))),
        ("least_error", Column("Least possible", lambda layer: format_quality(layer.get("least_error")))),
        ("held_error", Column("Held out", lambda layer: format_quality(layer.get("held_error")))),
    ]
    there = {key for layer in layers for key, value in layer.items() if value is not None}
    return [column for key, column in known if key == "name" or key in there]


def layer_totals(layers: Sequence[Layer]) -> list[str]:
    """The foot of a table of layers, one cell a column: how many, their parameters, their share of the dense ones."""
    known = [layer["parameters"] for layer in layers if layer.get("parameters") is not None]
    total = format_count(sum(known)) if known and len(known) == len(layers) else ABSENT
    cells = [f"{len(layers)} layer{'' if len(layers) == 1 else 's'}", "", "", total, format_percent(_kept(layers))]
    return cells + [""] * (len(layer_columns(layers)) - len(cells))


def _kept(layers: Sequence[Layer]) -> float | None:
    """Share of the dense parameters that the layers hold, None where a number is missing."""
    if not layers or any(layer.get("parameters") is None or not layer.get("dense_parameters") for layer in layers):
        return None
    return float(sum(layer["parameters"] for layer in layers) / sum(layer["dense_parameters"] for layer in layers))


def _words(name: object) -> str:
    return re.sub("[-_ ]+", " ", str(name)).lower()


def capitalized(name: str) -> str:
    """The name with a capital first letter, the others as they are."""
    return name[:1].upper() + name[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Terminal and Markdown


def console_table(data: Data) -> Table:
    """The table for a terminal: dense first, the best row at each requested keep in bold.

    It takes some 90 columns; in fewer the names of the rows wrap, the numbers never. Format, parameters, latency and
    peak memory are left to `markdown_table` and the page, which have the room.

    Raises:
        IsogridError: ``dense``, ``rows`` or a label is missing.
    """
    title = Text(str(data.get("title", "")), style="bold")
    caption = Text(table_legend(data, wide=False), style="dim")
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE)
    table.padding, table.show_edge = 0, False
    best = [id(row) for row in best_rows(data).values()]
    columns = [column for column in table_columns(data) if not column.wide]
    for index, column in enumerate(columns):
        # Only names may wrap; a number over two lines is no number.
        table.add_column(column.title.replace(" ", "\n"), justify=column.align, no_wrap=index > 0, overflow="fold")
    for index, row in enumerate(all_rows(data)):
        # Text, not str: a label like "[red]" is a label, not markup.
        cells = [Text(column.text(row)) for column in columns]
        table.add_row(*cells, style="bold" if id(row) in best else None, end_section=index == 0)
    return table


def layer_table(layers: Sequence[Layer]) -> Table:
    """The layers of one row for a terminal: format, sizes, parameters, error; totals at the foot."""
    table = Table(show_footer=True, box=box.SIMPLE, show_edge=False)
    table.padding = (0, 1, 0, 0)
    for column, total in zip(layer_columns(layers), layer_totals(layers), strict=True):
        title = column.title.replace(" ", "\n")
        table.add_column(title, footer=total, justify=column.align, no_wrap=column.align == "right", overflow="fold")
    for layer in layers:
        table.add_row(*(Text(column.text(layer)) for column in layer_columns(layers)))
    return table


def markdown_table(data: Data) -> str:
    """The table in GitHub's Markdown: dense first, numbers to the right, the best row at each requested keep in bold.

    Returns:
        Lines of equal width, the last one ended too, so the source reads as a table as well.

    Raises:
        IsogridError: ``dense``, ``rows`` or a label is missing.
    """
    columns = table_columns(data)
    best = [id(row) for row in best_rows(data).values()]
    lines = [[_escape_markdown(column.title) for column in columns]]
    for row in all_rows(data):
        cells = [_escape_markdown(column.text(row)) for column in columns]
        lines.append([f"**{cell}**" if cell != ABSENT else cell for cell in cells] if id(row) in best else cells)
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(columns))]
    rules = ["-" * (width - 1) + (":" if c.align == "right" else "-") for c, width in zip(columns, widths, strict=True)]

    def joined(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column.align == "right" else cell.ljust(width)
            for cell, column, width in zip(cells, columns, widths, strict=True)
        )
        return "| " + " | ".join(padded) + " |\n"

    return "".join(joined(line) for line in (lines[0], rules, *lines[1:]))


def markdown_page(data: Data) -> str:
    """`markdown_table` with its title, the command that made it, its settings, notes and warnings."""
    title = _escape_markdown(str(data.get("title") or "Compression"))
    parts = [f"# {title}\n", markdown_table(data), f"{_escape_markdown(table_legend(data))}\n"]
    facts = [(key, data[key]) for key in ("model", "created") if data.get(key)]
    facts += [*(data.get("settings") or {}).items(), *(data.get("machine") or {}).items()]
    if facts:
        parts.append("".join(f"- {_escape_markdown(str(k))}: {_escape_markdown(plain(v))}\n" for k, v in facts))
    remarks = [*(data.get("notes") or ()), *(f"{name}: {text}" for name, text in warnings_of(data))]
    if remarks:
        parts.append("".join(f"- {_escape_markdown(remark)}\n" for remark in remarks))
    if data.get("command"):
        # Indented, not fenced: no text can end the block.
        parts.append("".join(f"    {line}\n" for line in str(data["command"]).splitlines()))
    return "\n".join(parts)


def _escape_markdown(text: str) -> str:
    """The text as itself inside a table's cell: no markup, no new cell, one line."""
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", " ".join(text.split()))
