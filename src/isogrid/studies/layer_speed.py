"""How fast structured layers are, as a share of what their operation count promises, beside ``nn.Linear`` and peers.

Peers are the formulations that papers publish and users write (`Format.formulations`), chains of batched products and
einsums, and the portable products of this library. All calls of a point run in turns in one process; a point's figure
is a quotient of medians. At one row weights are read from memory: calls go round copies larger than the last cache, and
the promise is the ratio of bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import BudgetError, IsogridError
from isogrid.evaluation import (
    cold_copies,
    interleaved_times,
    median_interval,
    ratio_interval,
    training_peak_bytes,
    tune_layers,
)
from isogrid.formats import Budget, Format, as_format
from isogrid.kernels import native
from isogrid.linear import StructuredLinear, products
from isogrid.report import format_duration, save_figure
from isogrid.studies.layer_tables import heat_map, markdown, summaries
from isogrid.studies.rows import Say, heading, remembered, write_table

# Formats by the share they keep; a Monarch of half the dense size has 4 blocks, a smaller one 16.
FORMATS = {
    0.125: ("low_rank", "block_diagonal", "monarch(blocks=16)", "block_tensor_train", "blast"),
    0.5: ("low_rank", "block_diagonal", "monarch(blocks=4)", "block_tensor_train", "blast"),
}
FURTHER = ("low_rank_light", "kronecker", "block_dense")
WIDTHS = (768, 2048, 4096)
ROWS = (1, 16, 256)
DTYPES = ("float32", "bfloat16")
FULL_SHAPES = (*((width, width) for width in WIDTHS), (576, 1536), (1536, 576), (768, 3072), (3072, 768))
# Points that would ideally take less are ruled by the overhead of calls.
JUDGED_FROM_MS = 0.05
# Sides of the blocks, inputs of the first stage and outputs of the last, that sum to less are small: moving numbers
# then costs as much as multiplying them.
SMALL_SIDES = 192
# From so many rows on, more threads are judged by one thread's time.
SCALED_ROWS = 256
# A structured layer in automatic mode is to take no longer than a dense one, by more than measurements can tell.
ALLOWED = 1.05

Point = Mapping[str, Any]


def run_layer_speed(
    out: Path,
    *,
    full: bool = False,
    quick: bool = False,
    threads: Sequence[int] = (1,),
    repeats: int = 31,
    seed: int = 0,
    command: str = "isogrid bench",
    say: Say = print,
) -> dict[str, Any]:
    """Time formats x shapes x rows x sizes x dtypes, forward and with backward.

    Args:
        out: folder for ``table.md``, ``data.json`` and ``efficiency.png``. Points are kept in ``runs/bench/layers``.
        full: more formats, rectangular shapes, 2048 rows.
        quick: one width and few repeats.
        threads: numbers of torch's threads. With one alone all points are timed; of further ones the points of
            `SCALED_ROWS` and more, and the same calls on one thread among them.
        repeats: rounds of a forward point; one with backward gets half as many.
        seed: of the numbers multiplied.
        command: for the page.
        say: told each point.

    Returns:
        The data: points, and summaries by threads, dtype, direction and rows.

    Raises:
        IsogridError: no number of threads, or one below 1.
    """
    if not threads or min(threads) < 1:
        raise IsogridError(f"threads are numbers of 1 and more, got {list(threads)}")
    points = list(_points(full, quick, threads))
    settings: dict[str, Any] = {"repeats": 5 if quick else repeats, "seed": seed, "products": products()}
    estimate = sum(_estimate(point, settings["repeats"]) for point in points)
    say(f"{len(points)} points; about {format_duration(estimate)}")
    before = torch.get_num_threads()
    tuned: set[str] = set()
    rows = []
    try:
        for point in points:
            torch.set_num_threads(point["threads"])
            key = "-".join(str(value).replace(" ", "") for value in point.values())
            make = partial(_measured, point, settings, tuned)
            rows.append(remembered(Path("runs/bench/layers"), key, settings, make))
            say(_line(rows[-1]))
    finally:
        torch.set_num_threads(before)
    result = {
        **heading("Speed of structured layers", command, settings),
        "summaries": summaries(rows),
        "slower": [row["label"] for row in slower(rows)],
        "rows": rows,
    }
    write_table(result, markdown(result, slower(rows)), out)
    save_figure(heat_map([row for row in rows if row["threads"] == min(threads)]), out / "efficiency.png")
    return result


def slower(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points whose automatic mode is slower than dense beyond doubt: the whole interval above `ALLOWED`."""
    return [row for row in rows if row.get("auto") is not None and row["auto"]["lower"] > ALLOWED]


def _points(full: bool, quick: bool, threads: Sequence[int]) -> Iterator[dict[str, Any]]:
    shapes = FULL_SHAPES if full else tuple((width, width) for width in (WIDTHS[:1] if quick else WIDTHS))
    counts = (*ROWS, 2048) if full else ROWS
    for number, (keep, names) in itertools.product(threads, FORMATS.items()):
        for name, (m, n), rows, dtype in itertools.product(
            (*names, *(FURTHER if full else ())), shapes, counts, DTYPES
        ):
            if number > 1 and len(threads) > 1 and rows < SCALED_ROWS:
                continue
            member = _member(name, m, n, keep)
            for direction in ("forward", "forward + backward") if rows > 1 else ("forward",):
                if member is not None:
                    yield {
                        "format": member.label(), "keep": keep, "out": m, "in": n, "rows": rows, "dtype": dtype,
                        "direction": direction, "threads": number,
                    }  # fmt: skip


def _member(name: str, out_features: int, in_features: int, keep: float) -> Format | None:
    """The format at a size; None where these sides have none."""
    try:
        return as_format(name).sized(out_features, in_features, Budget.keep(keep, out_features, in_features))
    except (BudgetError, IsogridError):
        return None


def _estimate(point: Point, repeats: int) -> float:
    """Seconds that a point takes, roughly: copies and tuning, and some four times the dense layer's time a round."""
    dense = point["rows"] * point["out"] * point["in"] / (4e10 if point["dtype"] == "float32" else 1e11)
    dense += point["out"] * point["in"] / 1e10
    return 0.8 + repeats * 4 * dense * (1 if point["direction"] == "forward" else 1.5)


def _measured(point: Point, settings: Mapping[str, Any], tuned: set[str]) -> dict[str, Any]:
    m, n, rows, dtype = point["out"], point["in"], point["rows"], getattr(torch, point["dtype"])
    source = torch.Generator().manual_seed(settings["seed"])
    fmt = as_format(point["format"])
    backward = point["direction"] != "forward"
    cost = fmt.cost(m, n, dtype)
    x = torch.randn(rows, n, generator=source).to(dtype).requires_grad_(backward)
    gradient = torch.randn(rows, m, generator=source).to(dtype)
    copies = {"dense": cold_copies(rows, m * n * dtype.itemsize), "ours": cold_copies(rows, cost.bytes)}

    def layers(product: str, count: int) -> list[nn.Module]:
        made = [
            StructuredLinear(n, m, fmt, bias=False, dtype=dtype, generator=source).train(backward) for _ in range(count)
        ]
        for layer in made:
            layer.product = product
        return [layer.requires_grad_(backward) for layer in made]

    def call(
        some: Sequence[nn.Module], product: Callable[[Any, Tensor], Tensor], phase: float = 0.0
    ) -> Callable[[], None]:
        # Calls that go round the same copies keep apart: what the one has read is no longer in the cache for the other.
        begun = round(phase * len(some))
        turn = itertools.cycle((*some[begun:], *some[:begun]))

        def run() -> None:
            layer = next(turn)
            y = product(layer, x)
            if backward:
                x.grad = None
                layer.zero_grad()
                y.backward(gradient)

        for _ in some:  # what a layer keeps beside its factors is made before it is timed
            run()
        return run

    dense = [nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(backward) for _ in range(copies["dense"])]
    ours = layers("structured", copies["ours"])
    chains = {name: partial(_formulated, formulation) for name, formulation in fmt.formulations().items()}
    plan = None
    with torch.set_grad_enabled(backward):
        calls = {"dense": call(dense, _as_module), "ours": call(ours, _as_module)}
        if not backward:
            plan, automatic = _automatic(layers, copies, rows, point, tuned)
            calls["auto"] = call(automatic, _as_module)
        phases = iter(range(1, len(chains) + 2))
        calls |= {name: call(ours, chain, next(phases) / (len(chains) + 2)) for name, chain in chains.items()}
        with without_native():
            calls["portable"] = call(ours, _as_module, next(phases) / (len(chains) + 2))
        within: dict[str, Callable[[], AbstractContextManager[object]]] = {"portable": without_native}
        if point["threads"] > 1 and rows >= SCALED_ROWS:
            for name in ("dense", "ours"):
                calls[f"{name}, one thread"] = calls[name]
                within[f"{name}, one thread"] = partial(threads_set, 1)
        repeats = max(settings["repeats"] // 2, 3) if backward else settings["repeats"]
        times = interleaved_times(calls, repeats=repeats, within=within)
    found = {name: median_interval(one).value for name, one in times.items()}
    operations = (3 if backward else 1) * rows * m * n
    promise = m * n * dtype.itemsize / cost.bytes if rows == 1 else m * n / cost.multiply_adds
    stages = fmt.components(m, n)
    return {
        **point,
        "label": f"{point['format']} {m} x {n}, {rows} rows, {point['dtype']}, {point['direction']}",
        "promise": promise,
        "ms": found,
        "dense_gmacs": operations / found["dense"] / 1e6,
        "speedup": found["dense"] / found["ours"],
        "efficiency": found["dense"] / promise / found["ours"],
        "memory": training_peak_bytes(ours[0], x) / training_peak_bytes(dense[0], x) if backward else None,
        "auto": None if backward else vars(ratio_interval(times["auto"], times["dense"])),
        "plan": plan,
        "scaling": {name: found[f"{name}, one thread"] / found[name] for name in ("dense", "ours") if len(within) > 1},
        "judged": found["dense"] / promise >= JUDGED_FROM_MS,
        "small": stages[0].fan_in + stages[-1].fan_out < SMALL_SIDES,
    }


def _automatic(
    layers: Callable[[str, int], list[nn.Module]],
    copies: Mapping[str, int],
    rows: int,
    point: Point,
    tuned: set[str],
) -> tuple[str, list[nn.Module]]:
    """The plan of layers in automatic mode, measured on this machine first, and as many layers as it takes."""
    (first,) = layers("auto", 1)
    assert isinstance(first, StructuredLinear)
    key = f"{point['format']} {point['out']} {point['in']} {point['dtype']} {point['threads']}"
    if key not in tuned:
        tuned.add(key)
        tune_layers([first])
    plan = first.plan(rows)
    return plan, [first, *layers("auto", copies["dense" if plan == "dense" else "ours"] - 1)]


def _as_module(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _formulated(formulation: Any, layer: StructuredLinear, x: Tensor) -> Tensor:
    y: Tensor = formulation(layer.factors, x, layer.out_features)
    return y


@contextmanager
def without_native() -> Iterator[None]:
    """Products are portable inside."""
    kept = native.loaded()
    try:
        native._found = frozenset()
        yield
    finally:
        native._found = kept


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Torch has so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _line(row: Mapping[str, Any]) -> str:
    line = (
        f"{row['label']}, {row['threads']} threads: {row['speedup']:.2f} x dense ({row['promise']:.1f} promised), "
        f"efficiency {row['efficiency']:.2f}{'' if row['judged'] else ', not judged'}"
    )
    if row["auto"] is not None:
        line += f"; automatic ({row['plan']}) {row['auto']['value']:.2f} of dense"
    if row["scaling"]:
        line += f"; {row['scaling']['ours']:.2f} x one thread"
    return line
