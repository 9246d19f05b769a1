"""From one format to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import widened
from isogrid.formats import Format, as_format
from isogrid.linear.layer import StructuredLinear


def convert(
    layer: StructuredLinear, to: Format | str | Mapping[str, Any], *, tolerance: float | None = None, **options: Any
) -> tuple[StructuredLinear, float]:
    """The same layer in another format, and the relative error of its matrix.

    Args:
        layer: the layer; it is not changed.
        to: the target format. Where an exact way is known (`Format.rewritten`: Monarch as a Block Tensor-Train, a
            square circulant as a product of permuted Monarchs), it is taken, and nothing is fitted. Else, where the
            size is open (``LowRankLight()``, ``Permuted(Monarch(8))``), the smallest member within the tolerance is
            found: low rank becomes Low-Rank Light of the same rank, BlockDense low rank of its rank, and so on.
        tolerance: relative Frobenius error allowed in that search; None: 1e-12 for float64 layers, else 1e-6.
        options: of the target format's fit; with any, the matrix is fitted also where an exact way is known.

    Returns:
        (layer in the layer's dtype and on its device, error measured in float64 before rounding to that dtype).

    Raises:
        IsogridError: no member of the format comes within the tolerance; the message says how near the largest does.
    """
    fmt = as_format(to)
    like = layer.floating_factor()
    wide = {name: widened(value) if value.is_floating_point() else value for name, value in layer.factors.items()}
    sizes = layer.out_features, layer.in_features
    with torch.no_grad():
        matrix = layer.format.dense(wide, *sizes).detach()
    norm = matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)

    def fit(member: Format) -> tuple[dict[str, Tensor], float]:
        factors = member.fit(matrix, **options)
        return factors, float((matrix - member.dense(factors, *sizes)).norm() / norm)

    with torch.no_grad():
        exact = None if options else layer.format.rewritten(fmt, wide, *sizes)
    sizable = _sizable(fmt)
    if exact is not None:
        fmt, factors = exact
        error = float((matrix - fmt.dense(factors, *sizes)).norm() / norm)
    elif sizable is None or _fixed_size(sizable):
        factors, error = fit(fmt)
    else:
        allowed = tolerance if tolerance is not None else 1e-12 if like.dtype == torch.float64 else 1e-6
        low, high = 1, max(sizable.size_limit(*sizes), 1)
        fmt_high = _with_size(fmt, high)
        factors, error = fit(fmt_high)
        if error > allowed:
            raise IsogridError(
                f"{fmt.label()}: no {sizes[0]} x {sizes[1]} member comes within {allowed:g} of {layer.format.label()}; "
                f"the largest, {fmt_high.label()}, has relative error {error:.3g}"
            )
        best = fmt_high
        while low < high:
            middle = (low + high) // 2
            member = _with_size(fmt, middle)
            found, reached = fit(member)
            if reached <= allowed:
                high, best, factors, error = middle, member, found, reached
            else:
                low = middle + 1
        fmt = best
    specs = fmt.factors(*sizes)
    stored = {name: value.to(like.device, specs[name].dtype or like.dtype) for name, value in factors.items()}
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return StructuredLinear.from_factors(fmt, stored, *sizes, bias=bias).train(layer.training), error


def _sizable(fmt: Format) -> Format | None:
    """The format whose size a search moves: the format, or the one that it only wraps (Permuted, Capped); or None."""
    if fmt.size_field is not None:
        return fmt
    inner = getattr(fmt, "inner", None)
    return _sizable(inner) if isinstance(inner, Format) else None


def _with_size(fmt: Format, size: int) -> Format:
    """The member of another size, within what it is wrapped in."""
    if fmt.size_field is not None:
        return fmt.with_size(size)
    inner = getattr(fmt, "inner", None)
    assert isinstance(inner, Format)
    changes: dict[str, Any] = {"inner": _with_size(inner, size)}
    return dataclasses.replace(fmt, **changes)


def _fixed_size(fmt: Format) -> bool:
    """Whether a format's size was chosen by hand: then it is kept."""
    assert fmt.size_field is not None
    default = next(field.default for field in dataclasses.fields(fmt) if field.name == fmt.size_field)
    return bool(getattr(fmt, fmt.size_field) != default)
