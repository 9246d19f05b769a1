"""What members of formats cost, layer by layer, in the unit that a budget is in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import nn

from isogrid.errors import BudgetError
from isogrid.formats import Budget, Dense, Format
from isogrid.linear import linear_matrix


class Prices(ABC):
    """Whole numbers of a unit: parameters, bytes, nanoseconds.

    Args:
        layers: name to dense layer.
    """

    sizes: int = 128
    """Members of a closed error curve that are worth a price: neighbours tell a choice what their neighbours tell."""
    multiple: int = 1
    """Sizes on a closed error curve are multiples of this."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers

    @abstractmethod
    def of(self, name: str, member: Format) -> int:
        """What a layer costs in a format of a given size."""

    @abstractmethod
    def within(self, name: str, fmt: Format, limit: int) -> Format:
        """The largest member within a limit.

        Raises:
            BudgetError: there is none; names the layer.
        """

    def dense(self, name: str) -> int:
        """What the layer's own matrix costs."""
        return self.of(name, Dense())

    def whole(self) -> int:
        """What all layers' own matrices cost together."""
        return sum(self.dense(name) for name in self.layers)

    def share_of(self, name: str, share: float) -> int:
        """A share of the dense cost, rounded down."""
        # A hair of slack keeps exact fractions exact, as in `Budget.keep`.
        return math.floor(share * self.dense(name) * (1 + 1e-12))


class StoredPrices(Prices):
    """Parameters or bytes.

    Args:
        layers: name to dense layer.
        unit: a budget, for its unit; None: parameters.
    """

    def __init__(self, layers: Mapping[str, nn.Module], unit: Budget | None = None) -> None:
        super().__init__(layers)
        self.unit = unit or Budget(parameters=0)

    def of(self, name: str, member: Format) -> int:
        """Parameters or bytes of the member at the layer's sizes."""
        out_features, in_features = linear_matrix(self.layers[name]).shape
        return self.unit.amount(member.cost(out_features, in_features, self.unit.dtype))

    def within(self, name: str, fmt: Format, limit: int) -> Format:
        """The format's largest member within the limit."""
        out_features, in_features = linear_matrix(self.layers[name]).shape
        try:
            return fmt.sized(out_features, in_features, self.unit.with_limit(limit))
        except BudgetError as error:
            raise BudgetError(f"layer {name!r}: {error}; or skip the layer") from None
