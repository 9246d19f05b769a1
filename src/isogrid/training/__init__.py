"""A model trained in few numbers from the start, or from a trained start."""

from isogrid.training.factored import (
    FactoredLinear,
    factorize_trainable,
    merge_factors,
    truncate_factors,
)

__all__ = ["FactoredLinear", "factorize_trainable", "merge_factors", "truncate_factors"]
