"""Pictures: the blocks of a structured matrix, drawn to scale, and contact sheets of images."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isogrid.report.blocks import Color, ColoredFactor, colored_factors, dependence, rgb
from isogrid.report.canvas import BAND, FAINT, INK, empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY, EMPTY = "#8c8c8c", "#ffffff"
MOST_STRIPES = 4

# All in points; a figure is 7 inches wide and shown at about 700 pixels, where 8 points are 11 pixels.
WIDTH, MARGIN, GAP, BETWEEN = 504.0, 10.0, 3.0, 13.0
ROOM = WIDTH - 2 * MARGIN
SCALES = (9.0, 8.0, 7.0, 6.0, 5.5, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.7, 0.5)
LARGE = 5.0
TALLEST = 460.0
LONGEST_ROW = 24  # entries; a vector that is longer goes on in the next row
HEADING, SMALL, SIGN, LETTER = 9.0, 8.0, 15.0, 0.6
LINE = 11.0


def picture_sheet(pictures: Sequence[tuple[str, ArrayLike]], *, columns: int = 4) -> Figure:
    """A contact sheet: pictures of one size, each under its title.

    Args:
        pictures: (title, array (height, width, 3) of red, green and blue in [0, 1]).
        columns: pictures in a row.

    Raises:
        IsogridError: matplotlib is missing.
    """
    lines = -(-len(pictures) // columns)
    tall, wide, _ = np.shape(pictures[0][1])
    figure = empty_figure((3.0 * columns, (3.0 * tall / wide + 0.35) * lines))
    for place, (title, pixels) in enumerate(pictures):
        axes = figure.add_subplot(lines, columns, place + 1)
        axes.imshow(np.asarray(pixels), interpolation="lanczos")
        axes.set_title(title, fontsize=8, color=INK)
        axes.set_axis_off()
    return figure


def block_picture(anatomy: Mapping[str, Any]) -> Figure:
    """The factors to scale, every block in its own colour, and the matrix in the colours of the blocks it depends on.

    The matrix is drawn once for each weight factor. Blocks that reach the same entries are tints of one hue; an entry
    that depends on blocks of several hues is striped, of more than four grey; entries that the factor does not reach
    are white. The numbers of a weight of one axis run from dark to light. Blocks that reach no entry (they hold
    padding) are hatched. Factors that multiply stand side by side, the one applied to the input first at the right;
    sums have a plus sign; indices and codes stand apart, in shades by value.

    Args:
        anatomy: the dict of `isogrid.formats.anatomy.anatomy`.

    Raises:
        IsogridError: matplotlib is missing.
    """
    factors = colored_factors(anatomy)
    parts, matrices = _parts(anatomy, factors)
    unit, lines = _fitted(parts, matrices)
    tall = sum(_height(line, unit) + BETWEEN for line in lines)
    caption = _caption(anatomy)
    size = HEADING if len(caption) <= _letters(HEADING) else SMALL
    words = [(row, size, INK) for row in textwrap.wrap(caption, _letters(size))]
    words += [(row, SMALL, FAINT) for row in textwrap.wrap(_legend(factors), _letters(SMALL))]
    height = tall + 1.2 * LINE * len(words) + 2 * MARGIN
    figure = empty_figure((WIDTH / 72, height / 72))
    figure.set_layout_engine("none")  # every place is known
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))  # in points, downwards
    axes.set_axis_off()
    top = MARGIN
    for line in lines:
        _draw_line(axes, line, top, unit)
        top += _height(line, unit) + BETWEEN
    for row, size, color in words:
        _write(axes, WIDTH / 2, top + LINE / 2, row, size, color)
        top += 1.2 * LINE
    return figure


def _image(factor: ColoredFactor) -> NDArray[np.float64]:
    """``(out, in · 12, 3)``: every entry in the colour, or the stripes, of the kinds of blocks it depends on."""
    stripes = 12  # divides into 2, 3 and 4
    out_features, in_features = factor.counts.shape
    image = np.ones((out_features, in_features, stripes, 3)) * rgb(EMPTY)
    for row, column in np.argwhere(factor.counts):
        if factor.sources is not None:
            image[row, column] = factor.source_color(factor.sources[row, column])
            continue
        kinds = [kind for kind, mask in factor.kinds.items() if mask[row, column]]
        if len(kinds) > MOST_STRIPES:
            image[row, column] = rgb(MANY)
        else:
            image[row, column] = np.repeat([factor.tints[kind] for kind in kinds], stripes // len(kinds), axis=0)
    return image.reshape(out_features, in_features * stripes, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@dataclass(frozen=True)
class _Part:
    """Something in a line: a panel with words above and below, or, with no size, a sign.

    Attributes:
        above: lines of text over it, the first one larger.
        below: lines of text under it.
        size: (rows, columns) in entries.
        gaps: (down, across) number of gaps between blocks.
        draw: given axes, left, top, unit.
    """

    above: Sequence[str]
    below: Sequence[str]
    size: tuple[int, int]
    gaps: tuple[int, int]
    draw: Callable[[Axes, float, float, float], None] | None = None

    def body(self, unit: float) -> tuple[float, float]:
        """(height, width) of the panel in points."""
        return self.size[0] * unit + self.gaps[0] * GAP, self.size[1] * unit + self.gaps[1] * GAP

    def width(self, unit: float) -> float:
        """With its words, in points."""
        if self.draw is None:
            return _sign_size(self.above[0]) * LETTER * len(self.above[0]) + 2
        words = [HEADING * LETTER * 1.1 * len(self.above[0])]
        words += [SMALL * LETTER * len(text) for text in (*self.above[1:], *self.below)]
        return max(self.body(unit)[1], *words)


def _parts(anatomy: Mapping[str, Any], factors: Sequence[ColoredFactor]) -> tuple[list[_Part], list[_Part]]:
    """What stands before the equals sign, and what from it on."""
    known = {factor.name: factor for factor in factors}
    parts: list[_Part] = []
    for place, term in enumerate(anatomy["terms"]):
        if place:
            parts.append(_sign("+"))
        for turn, name in enumerate(term):
            if turn:
                parts.append(_sign("·"))
            parts.append(_factor_part(known.pop(name)))
    for place, factor in enumerate(known.values()):  # indices, codes, and what has no entries
        parts.append(_sign("and" if place else "with"))
        parts.append(_factor_part(factor))
    names = [name for term in anatomy["terms"] for name in term]
    weights = [factor for factor in factors if factor.role == "weight" and factor.name in names]
    weights.sort(key=lambda factor: names.index(factor.name))
    return parts, [_sign("="), *map(_matrix_part, weights)]


def _sign(text: str) -> _Part:
    return _Part((text,), (), (0, 0), (0, 0))


def _sign_size(text: str) -> float:
    return SIGN if len(text) == 1 else HEADING


def _factor_part(factor: ColoredFactor) -> _Part:
    words = [factor.name, " × ".join(map(str, factor.shape)) or "one number"]
    if factor.role != "weight":
        words.append(factor.role)
    if not factor.blocks or factor.sources is not None or (len(factor.shape) == 1 and factor.shape[0] > LONGEST_ROW):
        count = int(np.prod(factor.shape, dtype=int))
        across = max(1, min(count, LONGEST_ROW))
        return _Part(words, (), (-(-count // across), across), (0, 0), lambda *at: _draw_entries(factor, across, *at))
    rows, columns = factor.sides
    cells = _arrangement(factor)
    down, across = (max(cell[axis] for cell in cells) + 1 for axis in (0, 1))
    return _Part(
        words, (), (down * rows, across * columns), (down - 1, across - 1),
        lambda *at: _draw_blocks(factor, cells, *at),
    )  # fmt: skip


def _arrangement(factor: ColoredFactor) -> list[tuple[int, int]]:
    """Where each block stands, (down, across) in blocks: as its footprint lies in the matrix, where that is simple."""
    leading = factor.shape[:-2]
    count = len(factor.blocks)
    used = [mask for mask in factor.blocks if mask is not None and mask.any()]
    if len(leading) == 1 and len(used) > 1:
        rows, columns = np.array([mask.any(1) for mask in used]), np.array([mask.any(0) for mask in used])
        if rows.sum(0).max() == 1 and columns.sum(0).max() == 1:
            return [(place, place) for place in range(count)]
        if (rows == rows[0]).all() and not (columns == columns[0]).all():
            return [(0, place) for place in range(count)]
        if (columns == columns[0]).all() and not (rows == rows[0]).all():
            return [(place, 0) for place in range(count)]
    # Else in rows, as near to a square as the leading axes allow.
    high, wide = (max(side, 1) for side in factor.sides)
    splits = [int(np.prod(leading[place:], dtype=int)) for place in range(len(leading) + 1)]
    across = min(splits, key=lambda split: abs(np.log((split * wide) / (-(-count // split) * high))))
    return [divmod(place, across) for place in range(count)]


def _matrix_part(factor: ColoredFactor) -> _Part:
    out_features, in_features = factor.counts.shape
    words = (f"by {factor.name}", f"matrix {out_features} × {in_features}")
    return _Part(words, dependence(factor), (out_features, in_features), (0, 0), lambda *at: _draw_matrix(factor, *at))


def _fitted(parts: Sequence[_Part], matrices: Sequence[_Part]) -> tuple[float, list[list[_Part]]]:
    """Points for an entry, and the lines: one line if that leaves entries large, else the matrices below."""
    for unit in (scale for scale in SCALES if scale >= LARGE):
        lines = _lines([*parts, *matrices], unit)
        if len(lines) == 1 and _width(lines[0], unit) <= ROOM and _height(lines[0], unit) <= TALLEST:
            return unit, lines
    for most in (2, 3, 100):
        for unit in SCALES:
            lines = [*_lines(parts, unit), *_lines(matrices, unit)]
            fits = all(_width(line, unit) <= ROOM for line in lines)
            if fits and len(lines) <= most and sum(_height(line, unit) for line in lines) <= TALLEST:
                return unit, lines
    return unit, lines


def _letters(size: float) -> int:
    """Letters that a line of the figure holds."""
    return int(ROOM / (size * LETTER * 0.93))


def _lines(parts: Sequence[_Part], unit: float) -> list[list[_Part]]:
    """Parts in lines of the figure's width; a sign stays with the panel after it."""
    lines: list[list[_Part]] = [[]]
    for place, part in enumerate(parts):
        follows = [part] if part.draw is not None else [part, *parts[place + 1 : place + 2]]
        if lines[-1] and _width([*lines[-1], *follows], unit) > ROOM and not _ends_in_sign(lines[-1]):
            lines.append([])
        lines[-1].append(part)
    return lines


def _ends_in_sign(line: Sequence[_Part]) -> bool:
    return line[-1].draw is None


def _width(line: Sequence[_Part], unit: float) -> float:
    return sum(part.width(unit) for part in line) + BETWEEN * (len(line) - 1)


def _height(line: Sequence[_Part], unit: float) -> float:
    above, below = (max(len(getattr(part, side)) for part in line if part.draw) for side in ("above", "below"))
    return max(part.body(unit)[0] for part in line) + LINE * (above + below) + 6


def _draw_line(axes: Axes, line: Sequence[_Part], top: float, unit: float) -> None:
    tall = max(part.body(unit)[0] for part in line)
    above = LINE * max(len(part.above) for part in line if part.draw) + 3
    middle = top + above + tall / 2
    left = (WIDTH - _width(line, unit)) / 2
    for part in line:
        wide = part.width(unit)
        center = left + wide / 2
        if part.draw is None:
            _write(axes, center, middle, part.above[0], _sign_size(part.above[0]))
        else:
            body, across = part.body(unit)
            start = middle - body / 2
            part.draw(axes, center - across / 2, start, unit)
            for turn, text in enumerate(reversed(part.above)):
                first = turn == len(part.above) - 1
                size, color = (HEADING, INK) if first else (SMALL, FAINT)
                _write(axes, center, start - 3 - LINE * (turn + 0.5), text, size, color, bold=first)
            for turn, text in enumerate(part.below):
                _write(axes, center, start + body + 3 + LINE * (turn + 0.5), text, SMALL, FAINT)
        left += wide + BETWEEN


def _caption(anatomy: Mapping[str, Any]) -> str:
    share = f"{100 * anatomy['share']:.0f} %"
    return f"{anatomy['label']}: {anatomy['parameters']:,} parameters, dense {anatomy['dense_parameters']:,} ({share})"


def _legend(factors: Sequence[ColoredFactor]) -> str:
    """What the signs mean that the picture has."""
    weights = [factor for factor in factors if factor.role == "weight" and factor.blocks]
    said = []
    if any((factor.counts == 0).any() for factor in weights):
        said.append("entries that the factor does not reach are white")
    if any(None in factor.colors for factor in weights):
        said.append("hatched blocks reach no entry: padding")
    if any(len(factor.colors) > len(factor.kinds) > 0 for factor in weights if None not in factor.colors):
        said.append("tints of one colour reach the same entries")
    overlaps = [sum((mask.astype(int) for mask in factor.kinds.values()), np.zeros(1, int)).max() for factor in weights]
    if any(1 < most <= MOST_STRIPES for most in overlaps):
        said.append("striped entries depend on each colour")
    if any(most > MOST_STRIPES for most in overlaps):
        said.append(f"grey entries depend on more than {MOST_STRIPES} colours")
    if any(factor.values for factor in factors):
        said.append("indices in shades by value")
    return "; ".join(said)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def _write(
    axes: Axes, x: float, y: float, text: str, size: float, color: str | Color = INK, *, bold: bool = False
) -> None:
    axes.text(
        x, y, text, fontsize=size, color=color, ha="center", va="center_baseline" if size < SIGN else "center",
        fontweight="bold" if bold else "normal", parse_math=False,
    )  # fmt: skip


def _draw_blocks(
    factor: ColoredFactor, cells: Sequence[tuple[int, int]], axes: Axes, left: float, top: float, unit: float
) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = factor.sides
    for place, ((down, across), color) in enumerate(zip(cells, factor.colors, strict=True)):
        x, y = left + across * (columns * unit + GAP), top + down * (rows * unit + GAP)
        wide, tall = columns * unit, rows * unit
        if color is None:
            hatch = "////" if factor.role == "weight" else None
            axes.add_patch(Rectangle((x, y), wide, tall, facecolor=BAND, edgecolor=FAINT, linewidth=0.6, hatch=hatch))
            continue
        axes.add_patch(Rectangle((x, y), wide, tall, facecolor=color, linewidth=0))
        _grid(axes, x, y, rows, columns, unit)
        if len(cells) > 1 and min(wide, tall) >= 10:
            _write_number(axes, x + wide / 2, y + tall / 2, place, color)


def _write_number(axes: Axes, x: float, y: float, number: int, color: Color) -> None:
    from matplotlib.patheffects import withStroke

    light = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 0.55
    text = axes.text(x, y, str(number), fontsize=SMALL, ha="center", va="center", color=INK if light else "white")
    text.set_path_effects([withStroke(linewidth=2, foreground=color)])  # the grid passes behind the number


def _draw_entries(factor: ColoredFactor, across: int, axes: Axes, left: float, top: float, unit: float) -> None:
    """Entries in rows: indices and codes in shades by value, the numbers of a vector dark to light."""
    from matplotlib.patches import Rectangle

    count = int(np.prod(factor.shape, dtype=int))
    span = max(factor.values, default=0.0) or 1.0
    shades: list[Color] = [(0.95 - 0.7 * value / span,) * 3 for value in factor.values]
    colors = shades or [factor.colors[0] or rgb(BAND)] * count
    if factor.sources is not None:
        colors = [factor.source_color(number) for number in range(count)]
    for place, color in enumerate(colors):
        down, right = divmod(place, across)
        corner = (left + right * unit, top + down * unit)
        axes.add_patch(Rectangle(corner, unit, unit, facecolor=color, edgecolor="white", linewidth=0.4))


def _draw_matrix(factor: ColoredFactor, axes: Axes, left: float, top: float, unit: float) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = factor.counts.shape
    if not rows or not columns:
        return
    edges = (left, left + columns * unit, top + rows * unit, top)
    axes.imshow(_image(factor), extent=edges, aspect="auto", interpolation="nearest", origin="upper", zorder=1)
    _grid(axes, left, top, rows, columns, unit)
    axes.add_patch(
        Rectangle((left, top), columns * unit, rows * unit, fill=False, edgecolor=FAINT, linewidth=0.7, zorder=3)
    )


def _grid(axes: Axes, left: float, top: float, rows: int, columns: int, unit: float) -> None:
    """Thin lines between entries, where entries are large enough to be told apart."""
    from matplotlib.collections import LineCollection

    if unit < 3:
        return
    right, bottom = left + columns * unit, top + rows * unit
    lines = [[(left + unit * step, top), (left + unit * step, bottom)] for step in range(1, columns)]
    lines += [[(left, top + unit * step), (right, top + unit * step)] for step in range(1, rows)]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.45, zorder=2), autolim=False)
