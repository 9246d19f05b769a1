"""Measuring which product is the faster for each layer of a model on this machine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.evaluation.latency import interleaved_times
from isogrid.formats import Format
from isogrid.linear import StructuredLinear, prefers_dense, speed_table

# Dense enough for the ways products are written: few rows at a time, up to 64, and many.
TUNED_ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
# Up to so many rows the weights are what a product waits for, and in a model they come from memory.
COLD_ROWS = 4
COLD_BYTES = 128 * 2**20
# Of layers so small that more copies would be needed a model has no more either.
MOST_COPIES = 1024
# A call that takes longer says enough about more rows.
LONG_MS = 100.0
# Quotients within this factor of one are measured again, up to so many times in all.
CLOSE, MOST_ROUNDS = 1.25, 4

Say = Callable[[str], None]


def tune(
    model: nn.Module, *, rows: Sequence[int] = TUNED_ROWS, repeats: int = 9, say: Say = lambda _: None
) -> list[dict[str, Any]]:
    """Time each kind of structured layer against the dense product, and keep the times for all processes.

    Args:
        model: with structured layers, on the CPU; it is left as it is.
        rows: numbers of input rows to measure at; between them times are interpolated.
        repeats: timed calls of each kind, in turns; the median counts. Close decisions get up to four times as many.
        say: told each result.

    Returns:
        One row a kind of layer and number of rows: ``format``, ``out``, ``in``, ``dtype``, ``bias``, ``rows``,
        ``structured`` and ``dense`` milliseconds, and the ``plan``.

    Raises:
        IsogridError: no structured layer on the CPU.
    """
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    found = tune_layers(layers, rows=rows, repeats=repeats, say=say)
    if not found:
        raise IsogridError(f"{type(model).__name__} has no structured layer on the CPU; compress it first")
    for layer in layers:
        layer.replan()
    return found


def tune_layers(
    layers: Iterable[StructuredLinear],
    *,
    rows: Sequence[int] = TUNED_ROWS,
    repeats: int = 9,
    say: Say = lambda _: None,
) -> list[dict[str, Any]]:
    """`tune` for layers that are no model; what is no CPU layer is passed over."""
    kinds: dict[tuple[Any, ...], StructuredLinear] = {}
    for layer in layers:
        like = layer.floating_factor()
        if like.device.type == "cpu":
            key = (layer.format.label(), layer.out_features, layer.in_features, like.dtype, layer.bias is not None)
            kinds.setdefault(key, layer)
    table, found = speed_table(), []
    for (label, m, n, dtype, bias), layer in kinds.items():
        for count in sorted(rows):
            times = compare(layer.format, layer.factors, m, n, dtype, count, bias=layer.bias, repeats=repeats)
            table.learn(label, m, n, dtype, count, times, bias=bias)
            described = {"format": label, "out": m, "in": n, "dtype": str(dtype).removeprefix("torch."), "bias": bias}
            plan = "dense" if prefers_dense(times) else "structured"
            found.append(described | {"rows": count} | times | {"plan": plan})
            say(f"{label} {m} x {n}, {count} rows: {times['structured']:.3f} ms, dense {times['dense']:.3f} ms")
            if max(times.values()) > LONG_MS:
                break
    if found:
        table.save()
    return found


@torch.no_grad()
def compare(
    fmt: Format,
    factors: Mapping[str, Tensor],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    rows: int,
    *,
    bias: Tensor | None = None,
    repeats: int = 9,
) -> dict[str, float]:
    """Median milliseconds of a layer by its own product and by the dense one, ``{"structured": …, "dense": …}``.

    Calls take turns and are counted whole, as a model makes them. Few rows read their weights from memory, as they do
    in a model: calls go round copies larger than the last cache. Where the two are close, more calls decide.

    Args:
        fmt: the format.
        factors: of it; their values don't matter.
        out_features: rows of the matrix.
        in_features: its columns.
        dtype: of the inputs.
        rows: of the input.
        bias: added to the outputs.
        repeats: timed calls of each kind, up to four times as many.
    """
    device = next(iter(factors.values())).device
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def in_turn(product: str, size: int) -> Callable[[], Tensor]:
        layers = []
        for _ in range(cold_copies(rows, size)):
            copies = {name: value.detach().clone() for name, value in factors.items()}
            added = None if bias is None else bias.detach().clone()
            layer = StructuredLinear.from_factors(fmt, copies, out_features, in_features, bias=added)
            layer.product = product
            layers.append(layer.eval().requires_grad_(False))
            layer(x)  # what a layer keeps beside its factors is made before it is timed
        turn = itertools.cycle(layers)
        return lambda: next(turn)(x)

    calls = {
        "structured": in_turn("structured", sum(value.nbytes for value in factors.values())),
        "dense": in_turn("dense", out_features * in_features * dtype.itemsize),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(MOST_ROUNDS):
        for name, more in interleaved_times(calls, repeats=repeats).items():
            times[name] += more
        found = {name: statistics.median(measured) for name, measured in times.items()}
        if not 1 / CLOSE < found["structured"] / found["dense"] < CLOSE:
            break
    return found


def cold_copies(rows: int, size: int) -> int:
    """How many copies of so many bytes to go round, so that few rows find their weights in memory, not in a cache."""
    return min(max(-(-COLD_BYTES // max(size, 1)), 1), MOST_COPIES) if rows <= COLD_ROWS else 1
