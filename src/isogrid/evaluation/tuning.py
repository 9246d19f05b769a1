"""Measuring which product is the faster for each layer of a model on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from isogrid.errors import IsogridError
from isogrid.evaluation.latency import interleaved_medians
from isogrid.linear import WIN, StructuredLinear, speed_table

TUNED_ROWS = (1, 2, 5, 16, 64, 256)


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
        with torch.no_grad():
            matrix = layer.format.dense(factors, m, n).contiguous()
            for count in rows:
                x = torch.randn(count, n, generator=torch.Generator().manual_seed(0)).to(dtype)

                def structured(factors: Any = factors, x: Any = x, layer: Any = layer, m: int = m) -> Any:
                    return layer.format.multiply(factors, x, m)

                def dense(matrix: Any = matrix, x: Any = x) -> Any:
                    return nn.functional.linear(x, matrix)

                timed = interleaved_medians({"structured": structured, "dense": dense}, repeats=repeats)
                times = {name: one.median for name, one in timed.items()}
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
