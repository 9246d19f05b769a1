"""The layer that holds one matrix in one format."""

from isogrid.linear.convert import convert
from isogrid.linear.coupled import Coupled, Producer, Refused, find_coupled, survey_coupled
from isogrid.linear.dense_layers import is_linear, linear_matrix
from isogrid.linear.layer import StructuredLinear
from isogrid.linear.memory import MEMORY, check_memory, limit_memory
from isogrid.linear.shrink import Cut, NoAttention, shrink
from isogrid.linear.speed import keeps_its_codes, prefers_dense, products, speed_table

__all__ = [
    "MEMORY",
    "Coupled",
    "Cut",
    "NoAttention",
    "Producer",
    "Refused",
    "StructuredLinear",
    "check_memory",
    "convert",
    "find_coupled",
    "is_linear",
    "keeps_its_codes",
    "limit_memory",
    "linear_matrix",
    "prefers_dense",
    "products",
    "shrink",
    "speed_table",
    "survey_coupled",
]
