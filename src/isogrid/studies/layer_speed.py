"""How fast structured layers are, as a share of what their operation count promises, beside ``nn.Linear`` and peers.

Peers are the formulations that papers publish, chains of batched products with the rows on the left, and the portable
products of this library, with the rows on the right. All calls of a point run in turns in one process; a point's figure
is a quotient of medians. At one row weights are read from memory: calls go round copies larger than the last cache, and
the promise is the ratio of bytes.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.evaluation import interleaved_medians, training_peak_bytes
from isogrid.formats import Budget, Format, as_format
from isogrid.kernels import native
from isogrid.linear import StructuredLinear
from isogrid.report import describe_machine, replace_file, save_figure, today, write_json
from isogrid.studies.rows import Say, remembered

FORMATS = ("low_rank", "block_diagonal", "monarch", "block_tensor_train", "blast")
WIDTHS = (768, 2048, 4096)
ROWS = (1, 16, 256)
KEEPS = (0.125, 0.5)
DTYPES = ("float32", "bfloat16")
FULL_SHAPES = (*((width, width) for width in WIDTHS), (576, 1536), (1536, 576), (768, 3072), (3072, 768))
FULL_FORMATS = (*FORMATS, "low_rank_light", "kronecker", "block_dense")
# Points that would ideally take less are ruled by the overhead of calls.
JUDGED_FROM_MS = 0.05
# Block sides that sum to less are small: moving numbers costs as much as multiplying them.
SMALL_SIDES = 192
COLD_BYTES = 128 * 2**20


def run_layer_speed(
    out: Path,
    *,
    suite: str = "layers",
    full: bool = False,
    quick: bool = False,
    threads: int | None = None,
    repeats: int = 15,
    seed: int = 0,
    command: str = "isogrid bench",
    say: Say = print,
) -> dict[str, Any]:
    """Time formats x shapes x rows x sizes x dtypes, forward and with backward.

    Args:
        out: folder for ``table.md``, ``data.json`` and ``efficiency.png``. Points are kept in ``runs/bench``.
        suite: "layers".
        full: more formats, rectangular shapes, 2048 rows.
        quick: one width and few repeats.
        threads: of torch; None: as they are.
        repeats: of each call.
        seed: of the numbers multiplied.
        command: for the page.
        say: told each point.

    Returns:
        The data: points, and summaries by dtype and direction.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        points = list(_points(full, quick))
        settings = {"threads": torch.get_num_threads(), "repeats": 3 if quick else repeats, "seed": seed}
        say(f"{len(points)} points; about {len(points) * (0.3 if quick else 3) / 60:.0f} minutes")
        rows = []
        for point in points:
            key = "-".join(str(value) for value in point.values())
            rows.append(remembered(Path("runs/bench") / suite, key, settings, partial(_measured, point, settings)))
            say(_line(rows[-1]))
    finally:
        torch.set_num_threads(before)
    from isogrid import __version__

    result = {
        "title": "Speed of structured layers",
        "command": command,
        "created": today(),
        "machine": describe_machine(__version__),
        "settings": settings,
        "summaries": _summaries(rows),
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, out / "data.json")
    replace_file(out / "table.md", _markdown(result).encode())
    replace_file(out / "command.txt", f"{command}\n".encode())
    save_figure(_heat_map(rows), out / "efficiency.png")
    return result


def _points(full: bool, quick: bool) -> Any:
    shapes = FULL_SHAPES if full else tuple((width, width) for width in (WIDTHS[:1] if quick else WIDTHS))
    rows = (*ROWS, 2048) if full else ROWS
    for name, (m, n), count, keep, dtype in itertools.product(
        FULL_FORMATS if full else FORMATS, shapes, rows, KEEPS, DTYPES
    ):
        if name == "block_diagonal" and m != n:
            continue
        for direction in ("forward", "forward + backward") if count > 1 else ("forward",):
            yield {
                "format": name, "out": m, "in": n, "rows": count, "keep": keep, "dtype": dtype, "direction": direction
            }  # fmt: skip


def member(name: str, out_features: int, in_features: int, keep: float) -> Format:
    """The format at a size; a Monarch of half the dense size has 4 blocks, a smaller one 16."""
    if name == "monarch":
        return as_format({"name": "monarch", "blocks": 4 if keep == 0.5 else 16})
    return as_format(name).sized(out_features, in_features, Budget.keep(keep, out_features, in_features))


def _measured(point: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    m, n, rows, dtype = point["out"], point["in"], point["rows"], getattr(torch, point["dtype"])
    source = torch.Generator().manual_seed(settings["seed"])
    fmt = member(point["format"], m, n, point["keep"])
    backward = point["direction"] != "forward"
    cost = fmt.cost(m, n, dtype)
    x = torch.randn(rows, n, generator=source).to(dtype).requires_grad_(backward)
    dense = [nn.Linear(n, m, bias=False, dtype=dtype) for _ in range(_copies(rows, m * n * dtype.itemsize))]
    ours = [
        StructuredLinear(n, m, fmt, bias=False, dtype=dtype, generator=source).train(backward)
        for _ in range(_copies(rows, cost.bytes))
    ]
    for layer in (*dense, *ours):
        layer.requires_grad_(backward)
    gradient = torch.randn(rows, m, generator=source).to(dtype)

    def call(layers: Sequence[nn.Module], product: Callable[[Any, Tensor], Tensor]) -> Callable[[], None]:
        turn = itertools.cycle(layers)

        def run() -> None:
            layer = next(turn)
            y = product(layer, x)
            if backward:
                x.grad = None
                layer.zero_grad()
                y.backward(gradient)

        return run

    calls = {
        "dense": call(dense, lambda layer, x: layer(x)),
        "ours": call(ours, lambda layer, x: layer(x)),
        "published": call(ours, partial(_published, fmt)),
        "portable": call(ours, _portable),
    }
    if not backward:  # what is derived from factors is derived before
        with torch.no_grad():
            for layer in ours:
                layer(x)
    found = interleaved_medians(calls, repeats=settings["repeats"])
    operations = rows * m * n
    promise = m * n * dtype.itemsize / cost.bytes if rows == 1 else m * n / cost.multiply_adds
    times = {f"{name}_ms": timing.median for name, timing in found.items()}
    ideal = times["dense_ms"] / promise
    return {
        **point,
        "label": fmt.label(),
        "promise": promise,
        **times,
        "dense_gmacs": (3 if backward else 1) * operations / times["dense_ms"] / 1e6,
        "speedup": times["dense_ms"] / times["ours_ms"],
        "efficiency": ideal / times["ours_ms"],
        "memory": training_peak_bytes(ours[0], x) / training_peak_bytes(dense[0], x) if backward else None,
        "judged": ideal >= JUDGED_FROM_MS,
        "small": _small(fmt, m, n),
    }


def _copies(rows: int, size: int) -> int:
    return max(-(-COLD_BYTES // size), 1) if rows == 1 else 1


def _small(fmt: Format, out_features: int, in_features: int) -> bool:
    """Whether the sides of a stage's blocks sum to less than the bound."""
    shapes = [
        factor.shape[-2:] for factor in fmt.factors(out_features, in_features).values() if factor.role == "weight"
    ]
    if fmt.name == "blast":  # the coupling is no block
        shapes = [shapes[0], shapes[2]]
    return min(sum(shape) for shape in shapes) < SMALL_SIDES


@contextmanager
def _without_native() -> Any:
    kept = native.takes
    try:
        native.takes = lambda *_: False
        yield
    finally:
        native.takes = kept


def _portable(layer: StructuredLinear, x: Tensor) -> Tensor:
    with _without_native():
        y: Tensor = layer(x)
    return y


def _published(fmt: Format, layer: StructuredLinear, x: Tensor) -> Tensor:
    """The products as the papers write them: rows on the left, an intermediate and its permutation in memory."""
    factors, rows = layer.factors, len(x)
    if fmt.name == "monarch":  # Dao et al. 2022
        right, left = factors["right"], factors["left"]
        k, q, p = right.shape
        hidden = torch.bmm(x.reshape(rows, k, p).transpose(0, 1), right.mT).transpose(0, 1).reshape(rows, q, k)
        out = torch.bmm(hidden.permute(2, 0, 1).contiguous(), left.mT)
        return out.permute(1, 2, 0).reshape(rows, -1)
    if fmt.name == "block_tensor_train":  # Qiu et al. 2024
        right, left = factors["right"], factors["left"]
        (m1, m0, _), (n0, _, n1) = right.shape, left.shape
        hidden = torch.bmm(x.reshape(rows, m1, m0).transpose(0, 1), right).view(m1, rows, n0, -1)
        out = torch.bmm(hidden.permute(2, 1, 0, 3).reshape(n0, rows, -1), left)
        return out.transpose(0, 1).reshape(rows, n0 * n1)
    if fmt.name == "blast":  # Lee et al. 2024
        right, coupling, left = factors["right"], factors["coupling"], factors["left"]
        b, _, p = right.shape
        hidden = torch.bmm(x.view(rows, b, p).transpose(0, 1), right.mT)  # (columns, rows, rank)
        mixed = (coupling.unsqueeze(2) * hidden.unsqueeze(0)).sum(1)  # (row blocks, rows, rank)
        return torch.bmm(mixed, left.mT).transpose(0, 1).reshape(rows, -1)
    return _portable(layer, x)


def _summaries(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means and the least over judged points, by dtype, direction and number of rows."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["judged"]:
            groups.setdefault((row["dtype"], row["direction"], "one row" if row["rows"] == 1 else "more"), []).append(
                row
            )
    found = []
    for (dtype, direction, count), some in groups.items():
        blocked = [row for row in some if row["format"] not in ("low_rank", "block_diagonal")]
        found.append(
            {
                "dtype": dtype,
                "direction": direction,
                "rows": count,
                "points": len(some),
                "efficiency": _mean(row["efficiency"] for row in some),
                "least, large blocks": min((row["efficiency"] for row in some if not row["small"]), default=None),
                "least, small blocks": min((row["efficiency"] for row in some if row["small"]), default=None),
                "speedup": _mean(row["speedup"] for row in some),
                "least speedup": min(row["speedup"] for row in some),
                "over published": _mean(row["published_ms"] / row["ours_ms"] for row in blocked or some),
                "over best chain": _mean(
                    min(row["published_ms"], row["portable_ms"]) / row["ours_ms"] for row in blocked or some
                ),
                "peak memory": _mean(row["memory"] for row in some) if direction != "forward" else None,
                "dense GMAC/s": statistics.median(row["dense_gmacs"] for row in some),
            }
        )
    return found


def _mean(values: Any) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['out']} x {row['in']}, {row['rows']} rows, {row['dtype']}, {row['label']}, {row['direction']}: "
        f"{row['speedup']:.2f} x dense ({row['promise']:.1f} promised), efficiency {row['efficiency']:.2f}"
        f"{'' if row['judged'] else ', not judged'}"
    )


def _markdown(result: Mapping[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    lines = [f"# {result['title']}", ""]
    lines += [
        f"`{result['command']}` · {machine['cpu']} · {settings['threads']} threads · torch {machine['torch']}",
        "",
    ]
    heads = list(result["summaries"][0]) if result["summaries"] else []
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["summaries"]:
        lines.append("| " + " | ".join(_cell(row[head]) for head in heads) + " |")
    lines += ["", "Geometric means over judged points (ideal time of 50 µs and more). Efficiency: speedup over dense "
              "divided by the ratio of operations, at one row of bytes. Peak memory: the most bytes "
              "that forward and backward held at once, gradients, intermediates and working room included, over the "
              "dense layer's.", ""]  # fmt: skip
    heads = ["format", "out", "in", "rows", "dtype", "direction", "dense ms", "ours ms", "published ms", "portable ms",
             "promised", "speedup", "efficiency", "peak memory", "judged"]  # fmt: skip
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    keys = ["label", "out", "in", "rows", "dtype", "direction", "dense_ms", "ours_ms", "published_ms", "portable_ms",
            "promise", "speedup", "efficiency", "memory", "judged"]  # fmt: skip
    lines += ["| " + " | ".join(_cell(row[key]) for key in keys) + " |" for row in result["rows"]]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _heat_map(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Efficiency by format and size against rows, dtype and direction."""
    from isogrid.report.canvas import empty_figure

    down = list(dict.fromkeys(f"{row['format']} {row['keep']:g}, {row['out']} x {row['in']}" for row in rows))
    across = list(dict.fromkeys(f"{row['rows']} rows\n{row['dtype']}\n{row['direction']}" for row in rows))
    values = torch.full((len(down), len(across)), math.nan)
    for row in rows:
        place = down.index(f"{row['format']} {row['keep']:g}, {row['out']} x {row['in']}")
        values[place, across.index(f"{row['rows']} rows\n{row['dtype']}\n{row['direction']}")] = row["efficiency"]
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
