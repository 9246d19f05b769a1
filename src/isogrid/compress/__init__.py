"""A trained model, made smaller: select, calibrate, allocate, fit."""

from isogrid.compress.allocate import allocate_uniform
from isogrid.compress.calibrate import Moments, as_batches, collect_moments
from isogrid.compress.estimate import estimate_seconds
from isogrid.compress.pipeline import compress
from isogrid.compress.select import select_layers
from isogrid.compress.summary import (
    CompressionReport,
    LayerReport,
    count_parameters,
    dense_parameters,
    stored_bytes,
    structured_layers,
)

__all__ = [
    "CompressionReport",
    "LayerReport",
    "Moments",
    "allocate_uniform",
    "as_batches",
    "collect_moments",
    "compress",
    "count_parameters",
    "dense_parameters",
    "estimate_seconds",
    "select_layers",
    "stored_bytes",
    "structured_layers",
]
