"""What a format's blocks are and which entries of the matrix each of them reaches, found from the format itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.formats.base import Format
from isogrid.formats.factors import Factor, Factors, new_factors

SEED = 0
# Footprints are lists of booleans; more of them than this serve nobody.
MOST_BOOLEANS = 2**23
# Of the start's size. Formats that cap a factor by its size act below the cap as what they wrap.
SMALL = 0.25
# A change below this share of the largest entry is rounding.
ROUNDING = 1e-11


@torch.no_grad()
def anatomy(fmt: Format, out_features: int, in_features: int) -> dict[str, Any]:
    """The factors of an ``(out, in)`` matrix, their blocks, and the entries that depend on each block.

    The leading axes of a factor index its blocks and the last two are a matrix; a factor with one axis is one row, a
    scalar one entry. Dependence is measured on `Format.dense` alone, in float64 at small seeded random factors: a block
    is drawn anew and the entries that change are its footprint. Orders of inputs and outputs are drawn at random too,
    so that a format with an order shows it.

    Returns:
        A dict that JSON can hold:

        - ``format``, ``label``, ``out_features``, ``in_features``, ``parameters``, ``dense_parameters``, ``share``;
        - ``factors``, in the format's order: ``name``, ``role``, ``shape``, ``blocks`` with ``index`` (on the leading
          axes), ``rows``, ``columns`` and, for weights, ``footprint``, ``(out, in)`` nested lists of booleans; weights
          of one axis also have ``sources``, ``(out, in)``: the number of their one entry that an entry depends on, -1
          for none, -2 for several (left out where that is too much to trace); index and code factors have ``values``
          (flat) and no blocks;
        - ``terms``: names of the trained factors that multiply each other, the one applied last first; factors of
          different terms add up. Factors without entries are in no term.

    Raises:
        IsogridError: the hyper-parameters don't suit the sizes, or the blocks are too many to trace.
    """
    specs = fmt.factors(out_features, in_features)
    count = sum(math.prod(spec.shape[:-2]) for spec in specs.values() if spec.role == "weight")
    if count * out_features * in_features > MOST_BOOLEANS:
        raise IsogridError(
            f"{fmt.label()}: {count} blocks over {out_features} x {in_features} entries are too many to trace; "
            "take a smaller matrix of the same proportions"
        )
    values, others = _draws(fmt, specs, out_features, in_features)

    def dense(changes: Mapping[str, Tensor]) -> Tensor:
        return fmt.dense({**values, **changes}, out_features, in_features)

    base = dense({})
    rounding = ROUNDING * float(base.abs().max()) if base.numel() else 0.0
    factors = []
    for name, spec in specs.items():
        entry: dict[str, Any] = {"name": name, "role": spec.role, "shape": list(spec.shape), "blocks": []}
        factors.append(entry)
        if not spec.trainable:
            entry["values"] = values[name].flatten().tolist()
            continue
        rows, columns = (1, 1, *spec.shape)[-2:]
        for index in itertools.product(*map(range, spec.shape[:-2])):
            block: dict[str, Any] = {"index": list(index), "rows": rows, "columns": columns}
            if spec.role == "weight":
                changed = values[name].clone()
                changed[index] = others[name][index]
                block["footprint"] = ((dense({name: changed}) - base).abs() > rounding).tolist()
            entry["blocks"].append(block)
        if spec.role == "weight" and len(spec.shape) == 1 and spec.numel * base.numel() <= MOST_BOOLEANS:
            sources = torch.full(base.shape, -1)
            for number in range(spec.numel):
                changed = values[name].clone()
                changed[number] = others[name][number]
                reached = (dense({name: changed}) - base).abs() > rounding
                sources = torch.where(reached, torch.where(sources == -1, number, -2), sources)
            entry["sources"] = sources.tolist()

    def multiply_each_other(one: str, other: str) -> bool:
        # A sum has no mixed difference.
        both = dense({one: others[one], other: others[other]})
        alone = dense({one: others[one]}) + dense({other: others[other]})
        return bool(((both - alone + base).abs() > rounding).any())

    terms = _connected([name for name, spec in specs.items() if spec.trainable and spec.numel], multiply_each_other)
    parameters, whole = fmt.cost(out_features, in_features).parameters, out_features * in_features
    return {
        "format": fmt.name,
        "label": fmt.label(),
        "out_features": out_features,
        "in_features": in_features,
        "parameters": parameters,
        "dense_parameters": whole,
        "share": parameters / whole if whole else 0.0,
        "factors": factors,
        "terms": terms,
    }


def small_sizes(out_features: int, in_features: int, longest: int = 24) -> tuple[int, int]:
    """Sizes with about the same proportions and no side above ``longest``, which it divides into eighths."""
    larger = max(out_features, in_features)
    if larger <= longest:
        return out_features, in_features

    def scaled(size: int) -> int:
        eighth = longest / 8
        return max(round(round(size * longest / larger / eighth) * eighth), 1) if size else 0

    return scaled(out_features), scaled(in_features)


def _draws(fmt: Format, specs: Mapping[str, Factor], out_features: int, in_features: int) -> tuple[Factors, Factors]:
    """Random factors, and other random numbers for the trained ones."""
    generator = torch.Generator().manual_seed(SEED)
    values = new_factors(fmt, out_features, in_features, dtype=torch.float64)
    fmt.initialize(values, out_features, in_features, generator)
    others: Factors = {}
    for name, spec in specs.items():
        start = values[name]
        if spec.trainable:
            # A start of zeros would hide what it multiplies.
            size = float(start.square().mean().sqrt()) if start.numel() else 0.0
            scale, middle = (SMALL * (size or 1.0), 0.0) if spec.role == "weight" else (SMALL, start)
            for place in (values, others):
                drawn = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
                place[name] = middle + scale * drawn
        elif spec.role == "index" and start.ndim == 1 and torch.equal(start.sort().values, torch.arange(spec.numel)):
            values[name] = start[torch.randperm(start.numel(), generator=generator)]
    return values, others


def _connected(names: list[str], related: Callable[[str, str], bool]) -> list[list[str]]:
    """Names in groups that relations join: groups by their first names, the last name of a group first."""
    groups: list[list[str]] = []
    for name in names:
        joined = [group for group in groups if any(related(name, other) for other in group)]
        groups = [group for group in groups if group not in joined] + [[*itertools.chain(*joined), name]]
    groups = [sorted(group, key=names.index, reverse=True) for group in groups]
    return sorted(groups, key=lambda group: names.index(group[-1]))


__all__ = ["anatomy", "small_sizes"]
