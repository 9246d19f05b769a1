"""What the rows of a compression table say.

Everything here reads one plain dict, the data of a table: keys ``title``, ``command``, ``model``, ``created``,
``machine``, ``settings``, ``quality``, ``dense``, ``rows``, ``notes``, ``outcome`` (lines of ``figure``, ``requested``,
``predicted`` and ``achieved``, in words), ``size`` ("bytes": what quality is drawn against). Only ``dense``, ``rows``
and the ``label`` of each row must be there; what is absent is shown as a dash, and a column that nothing fills is left
out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from isogrid.errors import IsogridError
from isogrid.report.numbers import format_keep

Data = Mapping[str, Any]
Row = Mapping[str, Any]
Layer = Mapping[str, Any]

# An achieved share may pass the requested one by rounding only; beyond this it is said, and the row wins no comparison.
KEEP_TOLERANCE = 0.001


def all_rows(data: Data) -> list[Row]:
    """The dense row, then the others in their order.

    Raises:
        IsogridError: ``dense`` or ``rows`` is missing, or a row has no label.
    """
    for key, kind, example in (("dense", Mapping, "the dense model's row"), ("rows", Sequence, "a list of rows")):
        if not isinstance(data.get(key), kind):
            raise IsogridError(f"table {data.get('title', '')!r}: {key!r} is {data.get(key)!r}; give {example}")
    others: list[Row] = list(data["rows"])
    for index, row in enumerate(others):
        if not isinstance(row, Mapping) or not row.get("label"):
            raise IsogridError(f"table {data.get('title', '')!r}: rows[{index}] has no 'label'; name every row")
    return [{"label": "dense", "format": "dense", **data["dense"]}, *others]


def has_quality(data: Data) -> bool:
    """Whether any row's quality was measured."""
    return any(row.get("quality") is not None for row in all_rows(data))


def quality_name(data: Data) -> str:
    """What the quality is called: ``"perplexity"``."""
    return str((data.get("quality") or {}).get("name") or "quality")


def lower_is_better(data: Data) -> bool:
    """Whether a smaller quality number is the better one.

    Raises:
        IsogridError: ``quality["better"]`` is neither "lower" nor "higher".
    """
    better = (data.get("quality") or {}).get("better", "lower")
    if better not in ("lower", "higher"):
        raise IsogridError(f"quality {quality_name(data)!r}: better is {better!r}; write 'lower' or 'higher'")
    return bool(better == "lower")


def row_name(row: Row) -> str:
    """The label with the rung of a ladder, or with whether the row is calibrated where its label leaves that open."""
    label = str(row["label"])
    if row.get("rung"):
        return label if row["rung"] == label else f"{label}, {row['rung']}"
    return f"{label}, calibrated" if row.get("calibrated") and "calibrated" not in label.lower() else label


def over_budget(row: Row) -> bool:
    """Whether the row keeps more than was asked for."""
    requested, achieved = row.get("requested_keep"), row.get("achieved_keep")
    return requested is not None and achieved is not None and achieved > requested + KEEP_TOLERANCE


def requested_keeps(data: Data) -> list[float]:
    """The different requested shares, largest first."""
    asked = {row.get("requested_keep") for row in all_rows(data)[1:]}
    return sorted((keep for keep in asked if keep is not None), reverse=True)


def best_rows(data: Data) -> dict[float, Row | None]:
    """The row of best quality at each requested keep, largest keep first.

    A row with no finite quality, or one that keeps more than was asked for, wins nothing; None where no row is left.
    """
    sign = 1 if lower_is_better(data) else -1
    best: dict[float, Row | None] = {}
    for keep in requested_keeps(data):
        eligible = [
            row
            for row in all_rows(data)[1:]
            if row.get("requested_keep") == keep
            and row.get("quality") is not None
            and math.isfinite(row["quality"])
            and not over_budget(row)
        ]
        best[keep] = min(eligible, key=lambda row: sign * row["quality"], default=None)
    return best


def warnings_of(data: Data) -> list[tuple[str, str]]:
    """Every row's warnings, each with the name and keep of its row."""
    return [
        (row_name(row) + ("" if (keep := row.get("requested_keep")) is None else f" at keep {format_keep(keep)}"), text)
        for row in all_rows(data)
        for text in row.get("warnings") or ()
    ]
