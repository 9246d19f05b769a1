"""Measuring which product is the faster for each layer of a model on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.evaluation.latency import interleaved_medians
from isogrid.formats import Format
from isogrid.linear import WIN, StructuredLinear, speed_table

TUNED_ROWS = (1, 2, 5, 16, 64, 256)
# Up to so many rows a product waits for its weights; copies of them fill more than the last cache.
COLD_ROWS = 4
COLD_BYTES = 128 * 2**20


def tune(
    model: nn.Module,
    *,
    rows: Sequence[int] = TUNED_ROWS,
    repeats: int = 9,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time each kind of structured layer against the dense product, and keep the times for all processes.

    Args:
        model: with structured layers, on the CPU; it is left as it is.
        rows: numbers of input rows to measure at; each speaks for those up to the next.
        repeats: timed calls of each kind, in turns; the median counts.
        say: told each result.

    Returns:
        One row a kind of layer and number of rows: ``format``, ``out``, ``in``, ``dtype``, ``rows``, ``structured``
        and ``dense`` milliseconds, and the ``plan``.

    Raises:
        IsogridError: no structured layer on the CPU.
    """
    kinds: dict[tuple[Any, ...], StructuredLinear] = {}
    for module in model.modules():
        if isinstance(module, StructuredLinear) and module.floating_factor().device.type == "cpu":
            key = (module.format.label(), module.out_features, module.in_features, module.floating_factor().dtype)
            kinds.setdefault(key, module)
    if not kinds:
        raise IsogridError(f"{type(model).__name__} has no structured layer on the CPU; compress it first")
    table, found = speed_table(), []
    for (label, m, n, dtype), layer in kinds.items():
        factors = {name: value.detach() for name, value in layer.factors.items()}
        for count in rows:
            times = compare(layer.format, factors, m, n, dtype, count, repeats=repeats)
            table.learn(label, m, n, dtype, count, times)
            plan = "dense" if times["dense"] * WIN < times["structured"] else "structured"
            found.append(
                {"format": label, "out": m, "in": n, "dtype": str(dtype).removeprefix("torch."), "rows": count}
                | times
                | {"plan": plan}
            )
            say(f"{label} {m} x {n}, {count} rows: {times['structured']:.3f} ms, dense {times['dense']:.3f} ms")
    table.save()
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            module.replan()
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
    repeats: int = 9,
) -> dict[str, float]:
    """Median milliseconds of one product, ``{"structured": …, "dense": …}``, in turns.

    Few rows read their weights from memory, as they do in a model: calls go round copies larger than the last cache.

    Args:
        fmt: the format.
        factors: of it; their values don't matter.
        out_features: rows of the matrix.
        in_features: its columns.
        dtype: of inputs and dense matrix.
        rows: of the input.
        repeats: timed calls of each kind.
    """
    device = next(iter(factors.values())).device
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    matrix = torch.zeros(out_features, in_features, dtype=dtype, device=device)
    held = sum(value.nbytes for value in factors.values())
    copies = [{**factors}, *({k: v.clone() for k, v in factors.items()} for _ in range(_more(rows, held)))]
    for one in copies:  # what is derived from factors is derived before
        fmt.multiply(one, x, out_features)
    ours = itertools.cycle(copies)
    theirs = itertools.cycle([matrix, *(matrix.clone() for _ in range(_more(rows, matrix.nbytes)))])
    with torch.inference_mode():
        timed = interleaved_medians(
            {
                "structured": lambda: fmt.multiply(next(ours), x, out_features),
                "dense": lambda: nn.functional.linear(x, next(theirs)),
            },
            repeats=repeats,
        )
    return {name: one.median for name, one in timed.items()}


def _more(rows: int, size: int) -> int:
    return -(-COLD_BYTES // max(size, 1)) if rows <= COLD_ROWS else 0
