"""The lines of a figure: which rows one line joins, and how a format looks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from isogrid.report.rows import Row, row_name

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
    "sparse": ("#888888", "8"),
}
# A format that stands in no list gets one of these by its name, the same one in every figure.
OTHER_COLORS = ("#882255", "#332288", "#999933", "#44AA99", "#AA4499", "#117733", "#661100")
MORE_COLORS = (*OTHER_COLORS, "#0072B2", "#D55E00", "#009E73", "#E69F00")
OTHER_MARKERS = ("h", "<", ">", "p", "d", "*", "8")


def format_style(name: str) -> tuple[str, str]:
    """Colour and marker of a format, fixed by its name (hyper-parameters in brackets don't count)."""
    name = name.split("(")[0].strip()
    if name in STYLES:
        return STYLES[name]
    choice = zlib.crc32(name.encode())
    return OTHER_COLORS[choice % len(OTHER_COLORS)], OTHER_MARKERS[choice // 7 % len(OTHER_MARKERS)]


@dataclass(frozen=True)
class Series:
    """Rows that one line joins, and how the line looks.

    Attributes:
        name: for the legend.
        rows: one a requested keep.
        look: keyword arguments of ``Axes.plot``.
    """

    name: str
    rows: list[Row]
    look: Mapping[str, Any]


def series_of(rows: Sequence[Row]) -> list[Series]:
    """One line a format and calibration; two labels of one format at one keep are two lines."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row.get("format", row["label"])), bool(row.get("calibrated"))), []).append(row)
    result = []
    own_colors = {format_style(name)[0] for name, _ in groups}
    worn: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}  # filled and open markers
    for (name, calibrated), members in groups.items():
        keeps = [row.get("requested_keep") for row in members]
        labels = list(dict.fromkeys(row_name(row) for row in members))
        split = len(set(keeps)) < len(keeps)
        lines = [[row for row in members if row_name(row) == label] for label in labels] if split else [members]
        for index, line in enumerate(lines):
            color, marker = format_style(name)
            if index:  # another method of the format: a colour that no format of the figure has, and a marker
                color = next((other for other in MORE_COLORS if other not in own_colors), color)
                first = OTHER_MARKERS.index(marker) if marker in OTHER_MARKERS else 0
                marker = OTHER_MARKERS[(first - index) % len(OTHER_MARKERS)]
                own_colors.add(color)
            color, marker = _free(color, marker, worn[calibrated])
            worn[calibrated].add((color, marker))
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
            result.append(Series(own, line, look))
    return result


def _free(color: str, marker: str, worn: Set[tuple[str, str]]) -> tuple[str, str]:
    """This colour and marker, or where a line of the figure has them: another marker, then another colour."""
    others = [(color, other) for other in OTHER_MARKERS]
    others += [(other, form) for other in OTHER_COLORS for form in OTHER_MARKERS]
    return next((dress for dress in [(color, marker), *others] if dress not in worn), (color, marker))
