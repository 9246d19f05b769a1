"""What the layers of a model may keep in memory beside their factors."""

from __future__ import annotations

from torch import nn

from isogrid.errors import IsogridError
from isogrid.linear.layer import StructuredLinear

MEMORY = ("fast", "small")


def limit_memory(model: nn.Module, memory: str) -> nn.Module:
    """What `isogrid.set_memory` does to the layers of a model, in place; that one keeps it with the model, too.

    Raises:
        IsogridError: the word is not one of `MEMORY`.
    """
    check_memory(memory)
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            module.small_memory = memory == "small"
            module.replan()
            if module.small_memory:
                module.let_go()
    return model


def check_memory(memory: str) -> None:
    """Raise IsogridError unless the word is one of `MEMORY`."""
    if memory not in MEMORY:
        raise IsogridError(f"memory is 'fast' or 'small', got {memory!r}")
