"""The blocks of a structured matrix: their colours, and a picture of them in characters.

Everything is read from the plain dict that `isogrid.formats.anatomy.anatomy` returns; nothing here knows a format.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Color = tuple[float, float, float]

# Okabe & Ito and, after them, Tol: neighbours differ in lightness as well, for eyes that see few hues.
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#882255", "#999933")
# A factor with more kinds of blocks than hues runs through these, dark to light (viridis).
RAMP = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")
GLYPHS = "█░▓▒▚▀▌▄▐▞"


@dataclass(frozen=True)
class ColoredFactor:
    """A factor with the colours of its blocks.

    Attributes:
        name: its name.
        role: "weight", "gain", "structure", "index" or "code".
        shape: its sizes.
        blocks: footprint of each block, None where the role has none.
        sides: (rows, columns) of a block.
        colors: colour of each block; None: it reaches no entry.
        kinds: for each kind of blocks, a number, the entries it reaches.
        tints: for each kind, the mean of its blocks' colours.
        counts: (out, in) number of blocks an entry depends on.
        values: of an index or code factor.
        sources: of a weight of one axis, ``(out, in)``: the one entry of it that an entry depends on; -1: none.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    blocks: list[Mask | None]
    sides: tuple[int, int]
    colors: list[Color | None]
    kinds: dict[int, Mask]
    tints: dict[int, Color]
    counts: NDArray[np.int64]
    values: list[float]
    sources: NDArray[np.int64] | None

    def source_color(self, number: int) -> Color:
        """The colour of an entry of a weight of one axis: dark to light along it."""
        return rgb(_ramp(number / max(self.shape[0] - 1, 1)))


def colored_factors(anatomy: Mapping[str, Any]) -> list[ColoredFactor]:
    """Blocks that reach the same entries are tints of one hue; hues go on from factor to factor."""
    size = (int(anatomy["out_features"]), int(anatomy["in_features"]))
    found, used = [], 0
    for entry in anatomy["factors"]:
        blocks = [
            np.array(block["footprint"], dtype=bool).reshape(size) if "footprint" in block else None
            for block in entry["blocks"]
        ]
        members: dict[bytes, list[int]] = {}
        for place, mask in enumerate(blocks):
            if mask is not None and mask.any():
                members.setdefault(mask.tobytes(), []).append(place)
        hues = [HUES[(used + kind) % len(HUES)] for kind in range(len(members))]
        if len(members) > len(HUES):
            hues = [_ramp(kind / (len(members) - 1)) for kind in range(len(members))]
        used += len(members) if len(members) <= len(HUES) else 0
        colors: list[Color | None] = [None] * len(blocks)
        kinds, tints = {}, {}
        for kind, places in enumerate(members.values()):
            for turn, place in enumerate(places):
                colors[place] = _tint(hues[kind], 0.5 * turn / len(places))
            mask = blocks[places[0]]
            assert mask is not None
            kinds[kind] = mask
            tints[kind] = _tint(hues[kind], 0.5 * (len(places) - 1) / 2 / len(places))
        counts = sum((mask.astype(np.int64) for mask in blocks if mask is not None), np.zeros(size, np.int64))
        shape = tuple(entry["shape"])
        sides = (1, 1, *shape)[-2:]
        values = [float(value) for value in entry.get("values", ())]
        sources = None
        if "sources" in entry and shape[0] > 1:
            given = np.array(entry["sources"], dtype=np.int64).reshape(size)
            sources = given if given.min(initial=0) >= -1 else None  # several sources: the block's one colour
        marks = (colors, kinds, tints, counts)
        found.append(ColoredFactor(entry["name"], entry["role"], shape, blocks, sides, *marks, values, sources))
    return found


def dependence(factor: ColoredFactor) -> list[str]:
    """How many blocks an entry depends on, in one or two short lines."""
    counts = factor.counts[factor.counts > 0]
    blocks = sum(color is not None for color in factor.colors)
    if not len(counts):
        return ["reaches no entry"]
    if factor.sources is not None:
        return [f"1 of {factor.shape[0]} numbers an entry"]
    if blocks == 1:
        return ["1 block, all entries" if counts.size == factor.counts.size else f"1 block, {counts.size} entries"]
    low, high = counts.min(), counts.max()
    if low == high == blocks:
        return [f"all {blocks} blocks an entry"]
    return [f"{low} of {blocks} blocks an entry" if low == high else f"{low} to {high} of {blocks} blocks"]


def block_text(anatomy: Mapping[str, Any], *, width: int = 80) -> str:
    """The matrix once for each weight factor, in characters: one kind of block, one character.

    A dot is an entry that the factor does not reach, ``+`` one that depends on several kinds of blocks; where there are
    more kinds than characters, they repeat.

    Args:
        anatomy: the dict of `isogrid.formats.anatomy.anatomy`.
        width: columns of the terminal.
    """
    panels: list[list[str]] = []
    for factor in colored_factors(anatomy):
        if factor.role != "weight":
            continue
        kinds = np.array([factor.kinds[kind] for kind in sorted(factor.kinds)]).reshape(-1, *factor.counts.shape)
        lines = [factor.name, *dependence(factor)]
        for row in range(factor.counts.shape[0]):
            text = ""
            for column in range(factor.counts.shape[1]):
                found = np.flatnonzero(kinds[:, row, column])
                if factor.sources is not None and len(found):
                    found = factor.sources[row, column : column + 1]
                sign = "·" if not len(found) else "+" if len(found) > 1 else GLYPHS[found[0] % len(GLYPHS)]
                text += 2 * sign if sign not in "·+" else sign + " "
            lines.append(text)
        panels.append(lines)
    blocks: list[str] = []
    while panels:
        taken = 1
        wide = [max(map(len, panel)) for panel in panels]
        while taken < len(panels) and sum(wide[: taken + 1]) + 3 * taken <= width:
            taken += 1
        for cells in itertools.zip_longest(*panels[:taken], fillvalue=""):
            blocks.append("   ".join(cell.ljust(wide[place]) for place, cell in enumerate(cells)).rstrip())
        blocks.append("")
        panels = panels[taken:]
    return "\n".join(blocks).rstrip("\n")


def rgb(color: str) -> Color:
    """Red, green and blue of ``#rrggbb``."""
    red, green, blue = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue


def _mixed(one: Color, other: Color, share: float) -> Color:
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def _tint(color: str, share: float) -> Color:
    """A colour with a share of white."""
    return _mixed(rgb(color), (1.0, 1.0, 1.0), share)


def _ramp(place: float) -> str:
    """The colour at a place in [0, 1] of the ramp."""
    step = min(int(place * (len(RAMP) - 1)), len(RAMP) - 2)
    mixed = _mixed(rgb(RAMP[step]), rgb(RAMP[step + 1]), place * (len(RAMP) - 1) - step)
    return "#" + "".join(f"{round(255 * part):02x}" for part in mixed)
