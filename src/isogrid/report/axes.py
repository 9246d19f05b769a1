"""What stands on a figure's axes: ticks, limits, the band for what has no place, the legend, labels of points."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from isogrid.report.canvas import BAND, FAINT, GRID, INK
from isogrid.report.numbers import format_quality
from isogrid.report.rows import Row
from isogrid.report.series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A quality this many times worse than dense is a broken model: how broken is a number, not a place on the axis.
BROKEN = 100.0


def off_scale(value: float, reference: float | None, lower: bool) -> bool:
    """Whether a point has no place on the axis."""
    if not math.isfinite(value):
        return True
    return lower and reference is not None and 0 < reference < math.inf and value > BROKEN * reference


def darker(color: str) -> str:
    """A line's colour for small text, which needs more contrast than a line."""
    return "#" + "".join(f"{int(0.7 * int(color[place : place + 2], 16)):02x}" for place in (1, 3, 5))


def dress(axes: Axes) -> None:
    """White ground, a faint grid behind the lines, no frame above and to the right."""
    axes.set_facecolor("white")
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=10, color=INK)


def quality_axis(axes: Axes, values: Sequence[float], logarithmic: bool) -> None:
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


def leave_room(axes: Axes, xs: Sequence[float]) -> None:
    """Limits that hold the places along the size axis with room around."""
    low, high = min(xs, default=0.0), max(xs, default=100.0)
    # At least a tenth of the size across: rows of one requested keep differ by rounding, not by what the axis shows.
    room = max(0.12 * (high - low), (0.1 * abs(high) or 1.0) - (high - low))
    axes.set_xlim(low - room, high + room)


def off_scale_band(
    axes: Axes, lost: Sequence[tuple[Series, Sequence[Row]]], place: str, unit: float, lower: bool, logarithmic: bool
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
                textcoords="offset points", fontsize=8, color=darker(color), zorder=5,
            )  # fmt: skip
            text.set_in_layout(False)
    axes.text(
        0.012, (edges[0] + 0.015) if lower else (edges[1] - 0.015), "off the scale", fontsize=8, color=FAINT,
        transform=axes.transAxes, va="bottom" if lower else "top",
    )  # fmt: skip


def draw_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Every name once, below the figure, in at most so many columns; long names take fewer, and two lines at last."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    if not once:
        return
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # empty_figure's canvas is an Agg canvas
    shown = list(once)
    for fewer in [*range(min(columns, len(once)), 0, -1), 1]:
        legend = figure.legend(
            list(once.values()), shown, loc="outside lower center", ncols=fewer, fontsize=9, frameon=False,
            handlelength=2.8, labelcolor=INK,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)  # a "$" in a label is a "$"
        width = legend.get_window_extent(renderer).width
        if width <= figure.bbox.width or shown != list(once):
            return
        legend.remove()
        if fewer == 1:
            letters = max(map(len, shown))
            shown = [textwrap.fill(name, max(int(0.8 * letters * figure.bbox.width / width), 8)) for name in shown]


def label_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
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
        ink = darker(color)
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
