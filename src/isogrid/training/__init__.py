"""A model trained in few numbers from the start, or from a trained start."""

from isogrid.training.factored import (
    FactoredLinear,
    factorize_trainable,
    merge_factors,
    truncate_factors,
)
from isogrid.training.straight_through import (
    StraightThroughLinear,
    refresh_factors,
    settle_factors,
    straight_through,
)

__all__ = [
    "FactoredLinear",
    "StraightThroughLinear",
    "factorize_trainable",
    "merge_factors",
    "refresh_factors",
    "settle_factors",
    "straight_through",
    "truncate_factors",
]
