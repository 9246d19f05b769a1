"""Structured matrices for efficient deep learning: one interface for every format, on the models people have."""

from isogrid.checkpoint import load, merge, save
from isogrid.checkpoint.transformers_plugin import install as _install
from isogrid.compress import CompressionReport, Milliseconds, Moments, collect_moments, compress, select_layers
from isogrid.errors import BudgetError, CheckpointError, IsogridError, IsogridWarning
from isogrid.fitting import Metric
from isogrid.formats import (
    Armor,
    Blast,
    BlockDense,
    BlockDiagonal,
    BlockTensorChain,
    BlockTensorTrain,
    Budget,
    Capped,
    Circulant,
    Cost,
    Dense,
    DenseSparse,
    Factor,
    Format,
    Kronecker,
    LowRank,
    LowRankLight,
    Monarch,
    Permuted,
    Product,
    Quantized,
    SemiStructured,
    Sparse,
    Stored,
    Sum,
    TensorTrain,
    Traits,
    TritPlanes,
)
from isogrid.linear import StructuredLinear, convert

_install()

__version__ = "0.1.0"

__all__ = [
    "Armor",
    "Blast",
    "BlockDense",
    "BlockDiagonal",
    "BlockTensorChain",
    "BlockTensorTrain",
    "Budget",
    "BudgetError",
    "Capped",
    "CheckpointError",
    "Circulant",
    "CompressionReport",
    "Cost",
    "Dense",
    "DenseSparse",
    "Factor",
    "Format",
    "IsogridError",
    "IsogridWarning",
    "Kronecker",
    "LowRank",
    "LowRankLight",
    "Metric",
    "Milliseconds",
    "Moments",
    "Monarch",
    "Permuted",
    "Product",
    "Quantized",
    "SemiStructured",
    "Sparse",
    "Stored",
    "StructuredLinear",
    "Sum",
    "TensorTrain",
    "Traits",
    "TritPlanes",
    "collect_moments",
    "compress",
    "convert",
    "load",
    "merge",
    "save",
    "select_layers",
]
