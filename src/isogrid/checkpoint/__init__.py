"""Save and load models with structured layers, as Hugging Face models are."""

from isogrid.checkpoint.files import dense_copy, load, save, write_folder
from isogrid.checkpoint.layers import LayerEntry, describe_layers, mark_structured

__all__ = ["LayerEntry", "dense_copy", "describe_layers", "load", "mark_structured", "save", "write_folder"]
