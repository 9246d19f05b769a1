"""How much each layer may keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import nn

from isogrid.errors import BudgetError, IsogridError
from isogrid.formats import Budget, Format
from isogrid.linear import linear_matrix


def allocate_uniform(layers: Mapping[str, nn.Module], fmt: Format, keep: float) -> dict[str, Format]:
    """Every layer the same fraction of its dense parameters: the format's largest member within it.

    Raises:
        IsogridError: keep outside (0, 1).
        BudgetError: a layer has no member that small; names the layer.
    """
    if not isinstance(keep, int | float) or not 0 < keep < 1:
        raise IsogridError(f"keep is a fraction of the selected dense parameters between 0 and 1, got {keep!r}")
    _refuse_explicit_sizes(fmt)
    sized: dict[str, Format] = {}
    for name, module in layers.items():
        out_features, in_features = linear_matrix(module).shape
        try:
            sized[name] = fmt.sized(out_features, in_features, Budget.keep(keep, out_features, in_features))
        except BudgetError as error:
            raise BudgetError(f"layer {name!r}: {error}; or skip the layer") from None
    return sized


def _refuse_explicit_sizes(fmt: Format) -> None:
    """A size that keep would override is a contradiction, and a label that names it would be untrue."""
    for field in dataclasses.fields(fmt):
        value = getattr(fmt, field.name)
        if field.name == fmt.size_field and value != field.default:
            raise IsogridError(f"{fmt.label()}: keep chooses the {field.name}; leave {field.name}={value} out")
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Format):
                _refuse_explicit_sizes(part)
