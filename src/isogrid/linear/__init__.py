"""The layer that holds one matrix in one format."""

from isogrid.linear.convert import convert
from isogrid.linear.dense_layers import is_linear, linear_matrix
from isogrid.linear.layer import StructuredLinear
from isogrid.linear.speed import WIN, speed_table

__all__ = ["WIN", "StructuredLinear", "convert", "is_linear", "linear_matrix", "speed_table"]
