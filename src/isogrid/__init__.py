"""Structured matrices for efficient deep learning: one interface for every format, on the models people have."""

from isogrid.errors import BudgetError, CheckpointError, IsogridError, IsogridWarning
from isogrid.fitting import Metric
from isogrid.formats import (
    BlockTensorTrain,
    Budget,
    Cost,
    Dense,
    Factor,
    Format,
    LowRank,
    LowRankLight,
    Monarch,
    Permuted,
    Sum,
    Traits,
)
from isogrid.linear import StructuredLinear

__version__ = "0.1.0"

__all__ = [
    "BlockTensorTrain",
    "Budget",
    "BudgetError",
    "CheckpointError",
    "Cost",
    "Dense",
    "Factor",
    "Format",
    "IsogridError",
    "IsogridWarning",
    "LowRank",
    "LowRankLight",
    "Metric",
    "Monarch",
    "Permuted",
    "StructuredLinear",
    "Sum",
    "Traits",
]
