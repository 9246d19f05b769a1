"""Figures of compression tables: quality against size, error per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from isogrid.errors import IsogridError
from isogrid.report.axes import (
    darker,
    draw_legend,
    dress,
    label_points,
    leave_room,
    off_scale,
    off_scale_band,
    quality_axis,
)
from isogrid.report.canvas import FAINT, INK, empty_figure
from isogrid.report.numbers import format_keep, format_quality
from isogrid.report.rows import Data, Layer, Row, all_rows, lower_is_better, quality_name, requested_keeps
from isogrid.report.series import STYLES, Series, series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Relative errors above this are drawn at the edge: 1 is the error of answering zero.
LARGEST_ERROR = 1.25
DECADE = 10.0


def quality_against_size(data: Data, *, against: Literal["keep", "size"] = "keep", narrow: bool = False) -> Figure:
    """Quality of every row against what it keeps, one line a format and calibration, dense as a dashed line.

    The quality axis is logarithmic where lower is better and the drawn values span more than a decade. Points that
    are not finite, or 100 times worse than dense, stand as arrows in a band at the worse edge, with their value.

    Args:
        data: the data of a table (see `isogrid.report.rows`).
        against: "keep" for the kept share of the selected parameters (%), "size" for the whole model (MB).
        narrow: a figure for a column of a phone's width, with text as large as in the wide one.

    Raises:
        IsogridError: matplotlib is missing, or the data has no ``dense`` or ``rows``.
    """
    dense, *rows = all_rows(data)
    lower = lower_is_better(data)
    place, unit = {"keep": ("achieved_keep", 100.0), "size": ("bytes", 1e-6)}[against]
    shown = [row for row in rows if row.get(place) is not None and row.get("quality") is not None]

    def on_scale(row: Row) -> bool:
        return not off_scale(row["quality"], dense.get("quality"), lower)

    figure = empty_figure((4.2, 4.6) if narrow else (7.6, 4.8))
    axes = figure.add_subplot()
    dress(axes)

    series = series_of(shown)
    for line in series:
        points = sorted((unit * row[place], row["quality"]) for row in line.rows if on_scale(row))
        axes.plot([x for x, _ in points], [y for _, y in points], label=line.name, **line.look)
    reference = dense.get("quality")
    if reference is not None and math.isfinite(reference):
        label = f"dense, {format_quality(reference)}"
        axes.axhline(reference, color=STYLES["dense"][0], linestyle=(0, (6, 3)), linewidth=1.2, label=label, zorder=1)

    values = [row["quality"] for row in shown if on_scale(row)]
    if reference is not None and math.isfinite(reference):
        values.append(reference)
    logarithmic = lower and bool(values) and min(values) > 0 and max(values) / min(values) > DECADE
    quality_axis(axes, values, logarithmic)
    lost = [(line, [row for row in line.rows if not on_scale(row)]) for line in series]
    off_scale_band(axes, [(line, broken) for line, broken in lost if broken], place, unit, lower, logarithmic)

    xs = [unit * row[place] for row in shown]
    leave_room(axes, xs)
    axes.set_xlabel("kept of the selected parameters (%)" if against == "keep" else "size of the whole model (MB)")
    arrow = "lower is better" if lower else "higher is better"
    axes.set_ylabel(f"{quality_name(data)} ({arrow}{', log scale' if logarithmic else ''})", parse_math=False)
    if not shown:
        axes.text(0.5, 0.5, "no rows to draw", transform=axes.transAxes, ha="center", color=FAINT)
    draw_legend(figure, axes, columns=1 if narrow else 3)
    figure.draw_without_rendering()  # labels are placed in the final layout
    labelled = [(line.look["color"], row) for line in series for row in line.rows if on_scale(row)]
    label_points(axes, [(unit * row[place], row["quality"], color) for color, row in labelled])
    return figure


def error_per_layer(data: Data, *, keep: float | None = None, narrow: bool = False) -> Figure:
    """Relative output error of every layer, in the model's order: one panel a kind of layer, one line a row.

    Args:
        data: the data of a table (see `isogrid.report.rows`).
        keep: draw the rows with this requested keep; by default the one with most rows, of several the smallest, where
            errors are largest.
        narrow: a figure for a column of a phone's width.

    Raises:
        IsogridError: matplotlib is missing, or no row has this keep.
    """
    rows = [row for row in all_rows(data)[1:] if row.get("layers")]
    keeps = [row.get("requested_keep") for row in rows]
    if keep is not None and keep not in requested_keeps(data):
        asked = ", ".join(f"{known:g}" for known in requested_keeps(data))
        raise IsogridError(f"keep {keep!r}: no row asks for it; choose of {asked}")
    if keep is None and rows:
        keep = max(keeps, key=lambda value: (keeps.count(value), -math.inf if value is None else -value))
    rows = [row for row in rows if row.get("requested_keep") == keep]
    names = list(dict.fromkeys(str(layer.get("name")) for row in rows for layer in row["layers"]))
    kinds = layer_kinds(names)

    across = min(2 if narrow else 4, max(1, len(kinds)))
    down = max(1, math.ceil(len(kinds) / across))
    figure = empty_figure((4.2, 1.0 + 1.75 * down) if narrow else (7.6, 1.2 + 1.8 * down))
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    from matplotlib.ticker import MaxNLocator  # after empty_figure, which says what to do when matplotlib is missing

    panels: list[Axes] = [axes for line in grid for axes in line]
    title = "" if keep is None else f"keep {format_keep(keep)} of the selected parameters"
    figure.suptitle(title, fontsize=10, color=INK)
    if not kinds:
        panels[0].text(0.5, 0.5, "no layers to draw", transform=panels[0].transAxes, ha="center", color=FAINT)

    series = series_of(rows)
    errors = [_error(layer) for row in rows for layer in row["layers"]]
    top = 1.12 * max((error for error in errors if error is not None and error <= LARGEST_ERROR), default=1.0) or 1.0
    for index, (axes, (kind, members)) in enumerate(zip(panels, kinds.items(), strict=False)):
        dress(axes)
        axes.set_title(kind, fontsize=9, color=INK, loc="left", parse_math=False)
        for line in series:
            for row in line.rows:
                of_layer = {str(layer.get("name")): _error(layer) for layer in row["layers"]}
                _draw_errors(axes, line, [(members[name], of_layer.get(name)) for name in members], top)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(members) == 1:
            axes.set_xticks(list(members.values()))
        if index + across >= len(kinds):
            numbered = all(str(position) in name.split(".") for name, position in members.items())
            axes.set_xlabel("block" if numbered else "layer of this kind", fontsize=9)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    figure.supylabel("relative output error", fontsize=9, color=INK)
    draw_legend(figure, panels[0], columns=1 if narrow else 3)
    return figure


def layer_kinds(names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Sort layers by what they are: the last part of their names, or as many parts as tell the kinds apart.

    ``h.0.attn.c_proj`` and ``h.0.mlp.c_proj`` are two kinds, ``attn.c_proj`` and ``mlp.c_proj``.

    Returns:
        ``{kind: {name: position}}`` in the order given; positions are the blocks' numbers where each name of the kind
        holds one number of its own, else they count from 0.
    """
    patterns: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        patterns.setdefault(pattern, []).append(name)
    endings = {pattern: pattern.rsplit("*.", 1)[-1].split(".") for pattern in patterns}
    kinds: dict[str, dict[str, int]] = {}
    for pattern, members in patterns.items():
        others = [ending for other, ending in endings.items() if other != pattern]
        parts = endings[pattern]
        short = (parts[-count:] for count in range(1, len(parts) + 1))
        alone = next((part for part in short if not any(other[-len(part) :] == part for other in others)), None)
        if alone is None:  # the whole ending: it may be the tail of a longer one, but the same as none
            alone = parts if parts not in others else [pattern]
        numbers = [re.findall(r"(?<![^.])\d+(?![^.])", name) for name in members]
        single = all(len(found) == 1 for found in numbers) and len({found[0] for found in numbers}) == len(members)
        kinds[".".join(alone)] = {
            name: int(numbers[index][0]) if single else index for index, name in enumerate(members)
        }
    return kinds


def _error(layer: Layer) -> float | None:
    value = layer.get("error")
    return None if value is None else float(value)


def _draw_errors(axes: Axes, line: Series, points: Sequence[tuple[int, float | None]], top: float) -> None:
    """One row's errors in one panel; what is above the panel stands at its edge as an arrow."""
    look = {**line.look, "markersize": 3.5, "linewidth": 1.4, "markeredgewidth": 1.0}
    inside = [(x, math.nan if y is None or not y <= top else y) for x, y in points]  # nan breaks the line
    axes.plot([x for x, _ in inside], [y for _, y in inside], label=line.name, **look)
    for x, y in points:
        if y is not None and not y <= top:
            axes.plot([x], [0.97 * top], marker="^", color=line.look["color"], markersize=6, linestyle="")
            axes.annotate(
                format_quality(y), (x, 0.97 * top), xytext=(0, -9), textcoords="offset points", fontsize=7,
                ha="center", va="center", color=darker(line.look["color"]),
            ).set_in_layout(False)  # fmt: skip
