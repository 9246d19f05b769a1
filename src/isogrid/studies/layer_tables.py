"""Tables and the picture of layers' speeds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from isogrid.studies.rows import table_page

Row = Mapping[str, Any]


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric means and the least over judged points, by threads, dtype, direction and number of rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["judged"]:
            kind = "one row" if row["rows"] == 1 else "more"
            groups.setdefault((row["threads"], row["dtype"], row["direction"], kind), []).append(row)
    found = []
    for (threads, dtype, direction, count), some in groups.items():
        scaled = [row["scaling"] for row in some if row["scaling"]]
        found.append(
            {
                "threads": threads,
                "dtype": dtype,
                "direction": direction,
                "rows": count,
                "points": len(some),
                "efficiency": _mean(row["efficiency"] for row in some),
                "of large blocks": _mean(row["efficiency"] for row in some if not row["small"]),
                "least, large blocks": min((row["efficiency"] for row in some if not row["small"]), default=None),
                "least, small blocks": min((row["efficiency"] for row in some if row["small"]), default=None),
                "speedup": _mean(row["speedup"] for row in some),
                "least speedup": min(row["speedup"] for row in some),
                "over published": _over(some, "published"),
                "over einsum": _over(some, "einsum"),
                "over portable": _over(some, "portable"),
                "over the best of these": _mean(min(_peers(row).values()) / row["ms"]["ours"] for row in some),
                "peak memory": _mean(row["memory"] for row in some) if direction != "forward" else None,
                "dense GMAC/s": statistics.median(row["dense_gmacs"] for row in some),
                "x one thread": _mean(one["ours"] for one in scaled),
                "least x one thread": min((one["ours"] for one in scaled), default=None),
                "dense x one thread": _mean(one["dense"] for one in scaled),
            }
        )
    return found


def _peers(row: Row) -> dict[str, float]:
    return {name: row["ms"][name] for name in ("published", "einsum", "portable") if name in row["ms"]}


def _over(rows: Sequence[Row], peer: str) -> float | None:
    return _mean(row["ms"][peer] / row["ms"]["ours"] for row in rows if peer in row["ms"])


def _mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def markdown(result: Mapping[str, Any], slower: Sequence[Row]) -> str:
    """The page: summaries, what is slower than dense, and every point."""
    rows = result["rows"]
    automatic = [row for row in rows if row["auto"] is not None]
    worst = max(automatic, key=lambda row: row["auto"]["lower"], default=None)
    lines = [
        *table(result["summaries"]),
        "",
        "## Never slower",
        "",
        f"Inference in automatic mode at {len(automatic)} points, judged or not: "
        f"{sum(row['plan'] == 'dense' for row in automatic)} planned dense. Slower than dense, the whole 95 % interval "
        f"of the paired quotient above 1.05: {len(slower) or 'none'}.",
        *(["", *(f"- {_spelled(row)}" for row in slower)] if slower else []),
    ]
    if worst is not None and not slower:
        lines += ["", f"The nearest to it: {_spelled(worst)}."]
    lines += ["", "## Points", "", *table([_cells(row) for row in rows])]
    words = (
        f"{result['settings']['repeats']} interleaved repeats. Geometric means over judged points (ideal time of 50 µs "
        "and more). Efficiency: speedup over dense divided by the ratio of operations, at one row of bytes. Over "
        "published, einsum, portable: their time by ours. Peak memory: the most bytes that forward and backward held "
        "at once, gradients, intermediates and working room included, over the dense layer's."
    )
    return table_page(result, lines, words)


def _spelled(row: Row) -> str:
    auto = row["auto"]
    return (
        f"{row['label']}, {row['threads']} threads ({row['plan']}): {auto['value']:.3f} of dense "
        f"[{auto['lower']:.3f}, {auto['upper']:.3f}]"
    )


def _cells(row: Row) -> dict[str, Any]:
    ms, auto = row["ms"], row["auto"]
    return {
        "format": row["format"],
        "out": row["out"],
        "in": row["in"],
        "rows": row["rows"],
        "dtype": row["dtype"],
        "direction": row["direction"],
        "threads": row["threads"],
        **{f"{name} ms": ms.get(name) for name in ("dense", "ours", "published", "einsum", "portable")},
        "promised": row["promise"],
        "speedup": row["speedup"],
        "efficiency": row["efficiency"],
        "peak memory": row["memory"],
        "judged": row["judged"],
        "plan": row["plan"],
        "auto / dense": None if auto is None else f"{auto['value']:.2f} [{auto['lower']:.2f}, {auto['upper']:.2f}]",
        "x one thread": row["scaling"].get("ours"),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table; columns that are empty throughout are left out."""
    heads = [head for head in (rows[0] if rows else ()) if any(row[head] is not None for row in rows)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(_cell(row[head]) for head in heads) + " |" for row in rows)]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def heat_map(rows: Sequence[Row]) -> Any:
    """Efficiency by format and size against rows, dtype and direction."""
    from isogrid.report.canvas import empty_figure

    def down_of(row: Row) -> str:
        return f"{row['format'].partition('(')[0]} {row['keep']:g}, {row['out']} x {row['in']}"

    def across_of(row: Row) -> str:
        return f"{row['rows']} rows\n{row['dtype']}\n{row['direction']}"

    down = list(dict.fromkeys(map(down_of, rows)))
    across = list(dict.fromkeys(map(across_of, rows)))
    values = torch.full((len(down), len(across)), math.nan)
    for row in rows:
        values[down.index(down_of(row)), across.index(across_of(row))] = row["efficiency"]
    figure = empty_figure((2.5 + 1.0 * len(across), 1.2 + 0.26 * len(down)))
    axes = figure.add_subplot()
    axes.imshow(values.numpy(), cmap="RdYlGn", vmin=0, vmax=1.5, aspect="auto")
    axes.set_xticks(range(len(across)), across, fontsize=7)
    axes.set_yticks(range(len(down)), down, fontsize=7)
    for i, j in itertools.product(range(len(down)), range(len(across))):
        if not math.isnan(values[i, j]):
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6)
    axes.set_title("Speedup over dense as a share of what is promised", fontsize=9)
    return figure
