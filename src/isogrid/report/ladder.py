"""The figure of a ladder: what each step brings, for every format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from isogrid.report.axes import draw_legend, dress, label_points, quality_axis
from isogrid.report.canvas import FAINT, empty_figure
from isogrid.report.rows import Data, all_rows, requested_keeps, row_name
from isogrid.report.series import STYLES, format_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADE = 10.0


def is_ladder(data: Data) -> bool:
    """Whether the rows climb at one size: gaps on two rungs at least."""
    return (
        len(requested_keeps(data)) == 1
        and len({row["rung"] for row in all_rows(data)[1:] if row.get("rung") and row.get("gap") is not None}) > 1
    )


def gap_by_rung(data: Data, *, narrow: bool = False) -> Figure:
    """The gap of every row over its rung, one line a format; a recipe that is no rung is a dashed line across.

    The axis is logarithmic where gaps are positive and span more than a decade.

    Args:
        data: the data of a table (see `isogrid.report.rows`), rows with ``rung`` and ``gap``.
        narrow: a figure for a column of a phone's width, with text as large as in the wide one.

    Raises:
        IsogridError: matplotlib is missing, or the data has no ``dense`` or ``rows``.
    """
    rows = [row for row in all_rows(data)[1:] if row.get("rung") and math.isfinite(row.get("gap") or math.nan)]
    recipes = [row for row in rows if row["rung"] == row["label"]]
    climbing = [row for row in rows if row["rung"] != row["label"]]
    rungs = list(dict.fromkeys(row["rung"] for row in sorted(climbing, key=lambda row: _height(data, row["rung"]))))
    figure = empty_figure((4.2, 5.2) if narrow else (7.6, 4.8))
    axes = figure.add_subplot()
    dress(axes)
    lines: dict[str, list[tuple[float, float]]] = {}
    looks: dict[str, tuple[str, str]] = {}
    for row in climbing:
        lines.setdefault(str(row["label"]), []).append((float(rungs.index(row["rung"])), row["gap"]))
        looks[str(row["label"])] = format_style(str(row["format"]))
    for name, points in lines.items():
        color, marker = looks[name]
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=color, marker=marker, markersize=6, linewidth=1.7, label=name)
    for row in recipes:
        axes.axhline(
            row["gap"], color=STYLES["dense"][0], linestyle=(0, (6, 3)), linewidth=1.2, label=row_name(row), zorder=1
        )
    gaps = [row["gap"] for row in rows]
    logarithmic = bool(gaps) and min(gaps) > 0 and max(gaps) / min(gaps) > DECADE
    quality_axis(axes, gaps, logarithmic)
    axes.set_xlim(-0.3, max(len(rungs), 1) - 0.7)
    axes.set_xticks(range(len(rungs)), [str(rung).replace("+ ", "+\u00a0") for rung in rungs], fontsize=8)
    if narrow or len(rungs) > 6:
        axes.tick_params(axis="x", labelrotation=30)
    axes.set_ylabel(f"gap (nats a token{', log scale' if logarithmic else ''}; lower is better)")
    if not rows:
        axes.text(0.5, 0.5, "no rows to draw", transform=axes.transAxes, ha="center", color=FAINT)
    draw_legend(figure, axes, columns=1 if narrow else 3)
    figure.draw_without_rendering()  # labels are placed in the final layout
    label_points(axes, [(x, y, looks[name][0]) for name, points in lines.items() for x, y in points])
    return figure


def _height(data: Data, rung: str) -> int:
    """A rung's place: rows of each format are in climbing order, so the longest row of them says it best."""
    orders: dict[str, list[str]] = {}
    for row in all_rows(data)[1:]:
        if row.get("rung"):
            orders.setdefault(str(row["label"]), []).append(row["rung"])
    return max((order.index(rung) for order in orders.values() if rung in order), default=0)
