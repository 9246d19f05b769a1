"""Figures of compression tables: quality against size, error per layer.

Drawn on matplotlib's own canvas, never through pyplot, so nothing global changes and no window is needed. matplotlib
comes with ``pip install "isogrid[demo]"`` and is imported by the first figure.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isogrid.errors import IsogridError
from isogrid.report.files import replace_file
from isogrid.report.tables import (
    Data,
    Layer,
    Row,
    all_rows,
    format_keep,
    format_quality,
    lower_is_better,
    quality_name,
    requested_keeps,
    row_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe & Ito, distinct to colour-blind eyes; the marker says it again to printers without colour.
STYLES: dict[str, tuple[str, str]] = {
    "dense": ("#555555", "X"),
    "low_rank": ("#0072B2", "o"),
    "low_rank_light": ("#56B4E9", "P"),
    "monarch": ("#D55E00", "s"),
    "block_tensor_train": ("#009E73", "^"),
    "sum": ("#CC79A7", "D"),
    "permuted": ("#E69F00", "v"),
    "blast": ("#882255", "p"),
    "block_dense": ("#332288", "<"),
    "block_diagonal": ("#999933", ">"),
    "block_tensor_chain": ("#44AA99", "h"),
    "kronecker": ("#AA4499", "d"),
    "tensor_train": ("#117733", "*"),
    "unstructured": ("#888888", "8"),
}
# A format that stands in no list gets one of these by its name, the same one in every figure.
OTHER_COLORS = ("#882255", "#332288", "#999933", "#44AA99", "#AA4499", "#117733", "#661100")
OTHER_MARKERS = ("h", "<", ">", "p", "d", "*", "8")

INK, FAINT, GRID, BAND = "#222222", "#666666", "#dddddd", "#f3f1ec"
# A quality this many times worse than dense is a broken model: how broken is a number, not a place on the axis.
BROKEN = 100.0
# Relative errors above this are drawn at the edge: 1 is the error of answering zero.
LARGEST_ERROR = 1.25
DECADE = 10.0


def format_style(name: str) -> tuple[str, str]:
    """Colour and marker of a format, fixed by its name (hyper-parameters in brackets don't count)."""
    name = name.split("(")[0].strip()
    if name in STYLES:
        return STYLES[name]
    choice = zlib.crc32(name.encode())
    return OTHER_COLORS[choice % len(OTHER_COLORS)], OTHER_MARKERS[choice // 7 % len(OTHER_MARKERS)]


def quality_against_size(data: Data, *, against: Literal["keep", "size"] = "keep", narrow: bool = False) -> Figure:
    """Quality of every row against what it keeps, one line a format and calibration, dense as a dashed line.

    The quality axis is logarithmic where lower is better and the drawn values span more than a decade. Points that
    are not finite, or 100 times worse than dense, stand as arrows in a band at the worse edge, with their value.

    Args:
        data: the data of a table (see `isogrid.report.tables`).
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
        return not _off_scale(row["quality"], dense.get("quality"), lower)

    figure = empty_figure((4.2, 4.6) if narrow else (7.6, 4.8))
    axes = figure.add_subplot()
    _dress(axes)

    series = _series(shown)
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
    _quality_axis(axes, values, logarithmic)
    lost = [(line, [row for row in line.rows if not on_scale(row)]) for line in series]
    _off_scale_band(axes, [(line, broken) for line, broken in lost if broken], place, unit, lower, logarithmic)

    xs = [unit * row[place] for row in shown]
    _room(axes, xs)
    axes.set_xlabel("kept of the selected parameters (%)" if against == "keep" else "size of the whole model (MB)")
    arrow = "lower is better" if lower else "higher is better"
    axes.set_ylabel(f"{quality_name(data)} ({arrow}{', log scale' if logarithmic else ''})", parse_math=False)
    if not shown:
        axes.text(0.5, 0.5, "no rows to draw", transform=axes.transAxes, ha="center", color=FAINT)
    _legend(figure, axes, columns=1 if narrow else 3)
    figure.draw_without_rendering()  # labels are placed in the final layout
    labelled = [(line.look["color"], row) for line in series for row in line.rows if on_scale(row)]
    _label_points(axes, [(unit * row[place], row["quality"], color) for color, row in labelled])
    return figure


def error_per_layer(data: Data, *, keep: float | None = None, narrow: bool = False) -> Figure:
    """Relative output error of every layer, in the model's order: one panel a kind of layer, one line a row.

    Args:
        data: the data of a table (see `isogrid.report.tables`).
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

    series = _series(rows)
    errors = [_error(layer) for row in rows for layer in row["layers"]]
    top = 1.12 * max((error for error in errors if error is not None and error <= LARGEST_ERROR), default=1.0) or 1.0
    for index, (axes, (kind, members)) in enumerate(zip(panels, kinds.items(), strict=False)):
        _dress(axes)
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
    _legend(figure, panels[0], columns=1 if narrow else 3)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, 150 dots an inch, whole or not at all.

    Raises:
        OSError: the file cannot be written; an old one stays as it was.
    """
    return replace_file(path, png_bytes(figure))


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG, 150 dots an inch; the same figure gives the same bytes."""
    from PIL import Image  # comes with matplotlib

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    # A line drawing has few colours: a palette makes the file a third as large.
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
    return stream.getvalue()


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


def empty_figure(size: tuple[float, float]) -> Figure:
    """An empty white figure with a canvas of its own.

    Raises:
        IsogridError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise IsogridError(f'figures need matplotlib ({error}); pip install "isogrid[demo]"') from error
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Series


@dataclass(frozen=True)
class _Series:
    """Rows that one line joins, and how the line looks.

    Attributes:
        name: for the legend.
        rows: one a requested keep.
        look: keyword arguments of ``Axes.plot``.
    """

    name: str
    rows: list[Row]
    look: Mapping[str, Any]


def _series(rows: Sequence[Row]) -> list[_Series]:
    """One line a format and calibration; two labels of one format at one keep are two lines."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row.get("format", row["label"])), bool(row.get("calibrated"))), []).append(row)
    result = []
    for (name, calibrated), members in groups.items():
        keeps = [row.get("requested_keep") for row in members]
        labels = list(dict.fromkeys(row_name(row) for row in members))
        split = len(set(keeps)) < len(keeps)
        lines = [[row for row in members if row_name(row) == label] for label in labels] if split else [members]
        for index, line in enumerate(lines):
            color, marker = format_style(name)
            if index:
                marker = OTHER_MARKERS[(index - 1) % len(OTHER_MARKERS)]
            own = row_name(line[0])
            if not split and len(labels) > 1:  # the labels name the sizes too; the line is the format's
                own = f"{name.replace('_', ' ')}{', calibrated' if calibrated else ''}"
            look = {
                "color": color,
                "marker": marker,
                "markersize": 6,
                "markeredgewidth": 1.4,
                "markerfacecolor": color if calibrated else "white",
                "linestyle": "-" if calibrated else (0, (1.5, 1.5)),
                "linewidth": 1.7,
            }
            result.append(_Series(own, line, look))
    return result


def _off_scale(value: float, reference: float | None, lower: bool) -> bool:
    """Whether a point has no place on the axis."""
    if not math.isfinite(value):
        return True
    return lower and reference is not None and 0 < reference < math.inf and value > BROKEN * reference


def _error(layer: Layer) -> float | None:
    value = layer.get("error")
    return None if value is None else float(value)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _darker(color: str) -> str:
    """A line's colour for small text, which needs more contrast than a line."""
    return "#" + "".join(f"{int(0.7 * int(color[place : place + 2], 16)):02x}" for place in (1, 3, 5))


def _dress(axes: Axes) -> None:
    axes.set_facecolor("white")
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=10, color=INK)


def _quality_axis(axes: Axes, values: Sequence[float], logarithmic: bool) -> None:
    """Limits that hold the values with room around, and ticks in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if not values:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(NullLocator())
        return
    low, high = min(values), max(values)
    if logarithmic:
        axes.set_yscale("log")
        room = (high / low) ** 0.1
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _room(axes: Axes, xs: Sequence[float]) -> None:
    low, high = min(xs, default=0.0), max(xs, default=100.0)
    # At least a tenth of the size across: rows of one requested keep differ by rounding, not by what the axis shows.
    room = max(0.12 * (high - low), (0.1 * abs(high) or 1.0) - (high - low))
    axes.set_xlim(low - room, high + room)


def _off_scale_band(
    axes: Axes, lost: Sequence[tuple[_Series, Sequence[Row]]], place: str, unit: float, lower: bool, logarithmic: bool
) -> None:
    """Arrows in a band along the worse edge, a level for every line, each with its value."""
    if not lost:
        return
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory

    level, margin = 0.065, 0.015  # of the axes' height
    share = level * (len(lost) + 1) + 2 * margin  # the innermost level says what the band is
    low, high = axes.get_ylim()
    span = share / (1 - share)  # of what the values take, so that the band takes `share` of the whole
    if logarithmic:
        axes.set_ylim(low, high * (high / low) ** span)
    elif lower:
        axes.set_ylim(low, high + (high - low) * span)
    else:
        axes.set_ylim(low - (high - low) * span, high)
    edges = (1 - share, 1.0) if lower else (0.0, share)
    # Over the grid and without ticks: heights in the band mean nothing.
    axes.add_patch(Rectangle((0, edges[0]), 1, share, transform=axes.transAxes, color=BAND, zorder=0.8, linewidth=0))
    _, inner = axes.transData.inverted().transform(axes.transAxes.transform((0.0, edges[0] if lower else edges[1])))
    bottom, top = axes.get_ylim()
    kept = (bottom, inner) if lower else (inner, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if kept[0] <= tick <= kept[1]])  # outer ticks move the limits
    axes.minorticks_off()
    across = blended_transform_factory(axes.transData, axes.transAxes)
    for index, (line, rows) in enumerate(lost):
        height = margin + level * (index + 0.5)
        height = 1 - height if lower else height
        for row in rows:
            x, color = unit * row[place], line.look["color"]
            axes.plot(
                [x], [height], marker="^" if lower else "v", markersize=7, color=color, transform=across,
                markerfacecolor=line.look["markerfacecolor"], markeredgewidth=1.4, linestyle="", zorder=4,
            )  # fmt: skip
            text = axes.annotate(
                format_quality(row["quality"]), (x, height), xycoords=across, xytext=(7, 0), va="center",
                textcoords="offset points", fontsize=8, color=_darker(color), zorder=5,
            )  # fmt: skip
            text.set_in_layout(False)
    axes.text(
        0.012, (edges[0] + 0.015) if lower else (edges[1] - 0.015), "off the scale", fontsize=8, color=FAINT,
        transform=axes.transAxes, va="bottom" if lower else "top",
    )  # fmt: skip


def _draw_errors(axes: Axes, line: _Series, points: Sequence[tuple[int, float | None]], top: float) -> None:
    """One row's errors in one panel; what is above the panel stands at its edge as an arrow."""
    look = {**line.look, "markersize": 3.5, "linewidth": 1.4, "markeredgewidth": 1.0}
    inside = [(x, math.nan if y is None or not y <= top else y) for x, y in points]  # nan breaks the line
    axes.plot([x for x, _ in inside], [y for _, y in inside], label=line.name, **look)
    for x, y in points:
        if y is not None and not y <= top:
            axes.plot([x], [0.97 * top], marker="^", color=line.look["color"], markersize=6, linestyle="")
            axes.annotate(
                format_quality(y), (x, 0.97 * top), xytext=(0, -9), textcoords="offset points", fontsize=7,
                ha="center", va="center", color=_darker(line.look["color"]),
            ).set_in_layout(False)  # fmt: skip


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    if not once:
        return
    legend = figure.legend(
        list(once.values()), list(once), loc="outside lower center", ncols=min(columns, len(once)), fontsize=9,
        frameon=False, handlelength=2.8, labelcolor=INK,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a label is a "$"


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's value beside it, where no other value or marker stands; one without room goes unlabelled."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # empty_figure's canvas is an Agg canvas
    half = 4.5 * axes.figure.dpi / 72  # half a marker, in pixels
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    lines = [
        Bbox.from_extents(x, y, x, y)
        for line in axes.lines
        if line.get_transform() == axes.transData and line.get_linestyle() != "None"
        for start, end in itertools.pairwise(axes.transData.transform(line.get_xydata()))
        for x, y in (start + (end - start) * step / 60 for step in range(61))
    ]
    frame = axes.get_window_extent(renderer)
    sides = [(0, 7, "center", "bottom"), (0, -7, "center", "top"), (8, 0, "left", "center"), (-8, 0, "right", "center")]
    sides += [(6, 5, "left", "bottom"), (6, -5, "left", "top"), (-6, 5, "right", "bottom"), (-6, -5, "right", "top")]
    for x, y, color in points:
        ink = _darker(color)
        text = axes.annotate(
            format_quality(y), (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=ink, zorder=5
        )
        text.set_in_layout(False)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # lines pass behind the digits
        # First a place that no line crosses, then any that no other label takes.
        for obstacles, (dx, dy, horizontal, vertical) in itertools.product(([*taken, *lines], taken), sides):
            text.set(position=(dx, dy), horizontalalignment=horizontal, verticalalignment=vertical)
            box = text.get_window_extent(renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in obstacles):
                taken.append(box)
                break
        else:
            text.remove()
