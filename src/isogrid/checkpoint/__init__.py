"""Save and load models with structured layers, as Hugging Face models are."""

from isogrid.checkpoint.dense import dense_copy, merge
from isogrid.checkpoint.files import check_place, load, save, write_folder
from isogrid.checkpoint.layers import LayerEntry, describe_layers, mark_structured
from isogrid.checkpoint.pruned import PrunedEntry, describe_pruned
from isogrid.checkpoint.rewrites import deploy, set_memory

__all__ = [
    "LayerEntry",
    "PrunedEntry",
    "check_place",
    "dense_copy",
    "deploy",
    "describe_layers",
    "describe_pruned",
    "load",
    "mark_structured",
    "merge",
    "save",
    "set_memory",
    "write_folder",
]
