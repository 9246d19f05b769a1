"""How much each layer may keep."""

from __future__ import annotations

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
    if not 0 < keep < 1:
        raise IsogridError(f"keep is a fraction of the selected dense parameters between 0 and 1, got {keep}")
    sized: dict[str, Format] = {}
    for name, module in layers.items():
        out_features, in_features = linear_matrix(module).shape
        try:
            sized[name] = fmt.sized(out_features, in_features, Budget.keep(keep, out_features, in_features))
        except BudgetError as error:
            raise BudgetError(f"layer {name!r}: {error}; or skip the layer") from None
    return sized
