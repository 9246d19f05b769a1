"""The layer that holds one matrix in one format."""

from isogrid.linear.convert import convert, deploy
from isogrid.linear.dense_layers import is_linear, linear_matrix
from isogrid.linear.layer import StructuredLinear
from isogrid.linear.memory import MEMORY, check_memory, set_memory
from isogrid.linear.speed import prefers_dense, products, speed_table

__all__ = [
    "MEMORY",
    "StructuredLinear",
    "check_memory",
    "convert",
    "deploy",
    "is_linear",
    "linear_matrix",
    "prefers_dense",
    "products",
    "set_memory",
    "speed_table",
]
