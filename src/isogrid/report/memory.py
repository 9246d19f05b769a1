"""Pictures of memory and of runs: stacked bars, and lines of a measure over an ordered choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from isogrid.report.canvas import FAINT, GRID, INK, empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito, distinct to colour-blind eyes, then lighter tints of the same.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#555555", "#bbbbbb")
MARKERS = "os^Dv<>ph*"
MEBI = 2**20


def stacked_bars(bars: Mapping[str, Mapping[str, float]], *, title: str = "", unit: str = "MiB") -> Figure:
    """One horizontal bar a name, stacked from its parts, the total at its end.

    Args:
        bars: for each bar its parts in bytes; parts of the same name share a colour.
        title: above the picture.
        unit: MiB, or "bytes" to leave values as they are.

    Raises:
        IsogridError: matplotlib is missing.
    """
    scale = MEBI if unit == "MiB" else 1
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    figure = empty_figure((7.6, 1.4 + 0.42 * len(bars) + 0.12 * len(parts)))
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    places = range(len(bars) - 1, -1, -1)
    for number, part in enumerate(parts):
        widths = [bar.get(part, 0) / scale for bar in bars.values()]
        color = PALETTE[number % len(PALETTE)]
        axes.barh(
            list(places), widths, left=left, color=color, label=part, height=0.66, edgecolor="white", linewidth=0.5
        )
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, total in zip(places, left, strict=True):
        axes.text(total, place, f" {total:,.1f}", va="center", fontsize=9, color=INK)
    axes.set_yticks(list(places), list(bars), fontsize=9, color=INK)
    axes.set_xlabel(unit, fontsize=10, color=INK)
    axes.set_xlim(0, 1.14 * max(left, default=1) or 1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(True, axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, fontsize=11, color=INK, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def measure_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    log_x: bool = False,
) -> Figure:
    """One line a name through its points ``(x, y)``, in the order of x.

    Args:
        lines: points of each line.
        x: label of the axis.
        y: label of the axis.
        title: above the picture.
        log_x: base-2 logarithm, for ranks.

    Raises:
        IsogridError: matplotlib is missing.
    """
    figure = empty_figure((7.6, 4.8))
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        ordered = sorted(points)
        axes.plot(
            [a for a, _ in ordered],
            [b for _, b in ordered],
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)] if len(ordered) < 40 else None,
            markersize=5,
            linewidth=1.6,
            label=name,
        )
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    if title:
        axes.set_title(title, fontsize=11, color=INK, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
