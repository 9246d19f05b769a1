"""The page of a compression, one HTML file that needs nothing else, and the folder of everything a command writes."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isogrid.errors import IsogridError
from isogrid.report.canvas import png_bytes, save_figure
from isogrid.report.figures import error_per_layer, quality_against_size
from isogrid.report.files import replace_file, write_json
from isogrid.report.ladder import gap_by_rung, is_ladder
from isogrid.report.numbers import format_bytes, format_count, format_keep, format_percent, format_quality, plain
from isogrid.report.rows import (
    Data,
    Row,
    all_rows,
    best_rows,
    has_quality,
    lower_is_better,
    quality_name,
    requested_keeps,
    row_name,
    warnings_of,
)
from isogrid.report.tables import (
    Column,
    T,
    capitalized,
    layer_columns,
    layer_totals,
    markdown_page,
    table_columns,
    table_legend,
)

if TYPE_CHECKING:
    from jinja2 import Template

OUTCOME = ("figure", "requested", "predicted", "achieved")


def write_report(data: Data, folder: str | Path) -> dict[str, Path]:
    """Write everything a command leaves of a table, each file whole or not at all.

    The numbers come first: where matplotlib or jinja2 is missing, ``data.json``, ``table.md`` and ``command.txt`` are
    written before the error is raised.

    Args:
        data: the data of a table (see `isogrid.report.rows`).
        folder: where to; it is made when missing.

    Returns:
        The paths by file name: ``data.json``, ``table.md``, ``command.txt``, ``quality.png`` (``ladder.png`` where
        rows climb), ``errors.png``, ``report.html``.

    Raises:
        IsogridError: the data lacks ``dense``, ``rows`` or a label, or is not plain; or an extra is missing.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    table = markdown_page(data)
    written = {
        "data.json": write_json(data, folder / "data.json"),
        "table.md": replace_file(folder / "table.md", table.encode()),
        "command.txt": replace_file(folder / "command.txt", f"{data.get('command') or ''}\n".encode()),
    }
    if is_ladder(data):
        written["ladder.png"] = save_figure(gap_by_rung(data), folder / "ladder.png")
    elif has_quality(data):
        written["quality.png"] = save_figure(quality_against_size(data, against=_size(data)), folder / "quality.png")
    if any(row.get("layers") for row in all_rows(data)):
        written["errors.png"] = save_figure(error_per_layer(data), folder / "errors.png")
    return written | {"report.html": write_page(data, folder / "report.html")}


def write_page(data: Data, path: str | Path) -> Path:
    """Write one self-contained HTML page: summary, figures, table, layers, settings, machine, command, warnings.

    It asks the network for nothing and runs no script, so it can be mailed, archived and read offline.

    Args:
        data: the data of a table (see `isogrid.report.rows`).
        path: the file, written whole or not at all.

    Returns:
        The path.

    Raises:
        IsogridError: the data lacks ``dense``, ``rows`` or a label; or matplotlib or jinja2 is missing.
        OSError: the file cannot be written.
    """
    template = _template()
    facts = [(name, str(data[name])) for name in ("model", "created") if data.get(name)]
    best = best_rows(data)
    page = template.render(
        title=str(data.get("title") or "Compression"),
        facts=facts,
        summary=summary(data),
        headline=_headline(data) if has_quality(data) else None,
        outcome=_outcome(data),
        table=_table(all_rows(data), table_columns(data), [row for row in best.values() if row is not None]),
        legend=table_legend(data),
        errors=_error_pictures(data),
        details=[_detail(row) for row in all_rows(data)[1:] if row.get("layers")],
        settings=[(name, plain(value)) for name, value in (data.get("settings") or {}).items()],
        machine=[(name, plain(value)) for name, value in (data.get("machine") or {}).items()],
        command=str(data.get("command") or ""),
        notes=[str(note) for note in data.get("notes") or ()],
        warnings=warnings_of(data),
    )
    return replace_file(path, page.encode())


def summary(data: Data) -> str:
    """The best row at each requested keep, in one sentence with dense as its measure."""
    dense = all_rows(data)[0]
    if not has_quality(data):
        sizes = [f"{row['label']} kept {format_percent(row.get('achieved_keep'))}" for row in all_rows(data)[1:]]
        return f"{'; '.join(sizes)} of the selected parameters. The model's quality was not measured."
    name, best = quality_name(data), best_rows(data)
    if not best:
        return f"The dense model's {name} is {format_quality(dense.get('quality'))}; no row asks for a smaller one."
    parts = []
    for keep, row in best.items():
        if row is None:
            parts.append(f"none with a finite number at keep {format_keep(keep)}")
            continue
        size = ""
        if row.get("bytes") and dense.get("bytes"):
            size = f" in {format_percent(row['bytes'] / dense['bytes'])} of the bytes"
        calibrated = "calibrated " if row.get("calibrated") and "calibrated" not in row["label"].lower() else ""
        parts.append(f"{calibrated}{row['label']} at keep {format_keep(keep)}, {format_quality(row['quality'])}{size}")
    better = "lower is better" if lower_is_better(data) else "higher is better"
    reference = f"dense {format_quality(dense['quality'])}, " if dense.get("quality") is not None else ""
    return f"Best {name} ({reference}{better}): {'; '.join(parts)}."


# ---------------------------------------------------------------------------------------------------------------------
# What the template is given


@dataclass(frozen=True)
class _Picture:
    """A figure at two widths, as data URIs.

    Attributes:
        wide, narrow: for a desk and for a phone.
        alt: what it shows, for those who cannot see it.
        caption: the line below it.
    """

    wide: str
    narrow: str
    alt: str
    caption: str


@dataclass(frozen=True)
class _Table:
    """Cells as text. Attributes: heads, lines and totals with one cell a column; ``numeric`` and ``best`` are flags."""

    heads: list[str]
    numeric: list[bool]
    lines: list[list[str]]
    best: list[bool]
    totals: list[str]


@dataclass(frozen=True)
class _Detail:
    """A row's layers, folded away below its name."""

    name: str
    note: str
    folder: str
    table: _Table


def _template() -> Template:
    """The page's template; everything put into it is escaped.

    Raises:
        IsogridError: jinja2 is missing.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise IsogridError(f'the page needs jinja2 ({error}); pip install "isogrid[demo]"') from error
    environment = Environment(
        loader=PackageLoader("isogrid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _headline(data: Data) -> _Picture:
    name = quality_name(data)
    if is_ladder(data):
        return _Picture(
            wide=_data_uri(png_bytes(gap_by_rung(data))),
            narrow=_data_uri(png_bytes(gap_by_rung(data, narrow=True))),
            alt=f"Gap of each format on each rung. {summary(data)}",
            caption="Gap to the dense model on each rung, one line a format.",
        )
    against = _size(data)
    what = "the kept share of the selected parameters" if against == "keep" else "the size of the whole model"
    return _Picture(
        wide=_data_uri(png_bytes(quality_against_size(data, against=against))),
        narrow=_data_uri(png_bytes(quality_against_size(data, against=against, narrow=True))),
        alt=f"{name} against {what}. {summary(data)}",
        caption=f"{capitalized(name)} against {what}; filled and solid: calibrated.",
    )


def _size(data: Data) -> Literal["keep", "size"]:
    """What quality is drawn against: bytes of the whole model where the table says that they count."""
    return "size" if data.get("size") == "bytes" else "keep"


def _error_pictures(data: Data) -> list[_Picture]:
    """One figure a requested keep that has layers, the smallest keep first, where errors are largest."""
    rows = [row for row in all_rows(data)[1:] if row.get("layers")]
    keeps: list[float | None] = [
        keep for keep in reversed(requested_keeps(data)) if any(row.get("requested_keep") == keep for row in rows)
    ]
    if not keeps and rows:
        keeps = [None]
    pictures = []
    for keep in keeps:
        kept = "" if keep is None else f" at keep {format_keep(keep)}"
        pictures.append(
            _Picture(
                wide=_data_uri(png_bytes(error_per_layer(data, keep=keep))),
                narrow=_data_uri(png_bytes(error_per_layer(data, keep=keep, narrow=True))),
                alt=f"Relative output error of each layer{kept}; the numbers stand in the tables of layers below.",
                caption=f"Relative output error of each layer{kept}. 1 is the error of an output of zeros.",
            )
        )
    return pictures


def _outcome(data: Data) -> _Table | None:
    """What was asked for, predicted and achieved, as the data words it; None where it says nothing of it."""
    lines = [[plain(line.get(key)) for key in OUTCOME] for line in data.get("outcome") or ()]
    heads = [capitalized(key) for key in OUTCOME]
    return _Table(heads, [key != "figure" for key in OUTCOME], lines, [False] * len(lines), []) if lines else None


def _detail(row: Row) -> _Detail:
    layers = row["layers"]
    keep = row.get("requested_keep")
    errors = [layer["error"] for layer in layers if layer.get("error") is not None]
    worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=None)
    note = [] if keep is None else [f"keep {format_keep(keep)} asked"]
    if row.get("achieved_keep") is not None:
        note.append(f"{format_percent(row['achieved_keep'])} achieved")
    if row.get("parameters") is not None:
        note.append(f"{format_count(row['parameters'])} parameters")
    if row.get("bytes") is not None:
        note.append(format_bytes(row["bytes"]))
    if worst is not None:
        note.append(f"largest error {format_quality(worst)}")
    table = _table(layers, layer_columns(layers), [], layer_totals(layers))
    return _Detail(row_name(row), ", ".join(note), str(row.get("folder") or ""), table)


def _table(rows: Sequence[T], columns: Sequence[Column[T]], best: Sequence[T], totals: Sequence[str] = ()) -> _Table:
    return _Table(
        heads=[column.title for column in columns],
        numeric=[column.align == "right" for column in columns],
        lines=[[column.text(row) for column in columns] for row in rows],
        best=[any(row is winner for winner in best) for row in rows],
        totals=list(totals),
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
