"""What the layers of a model may keep in memory beside their factors."""

from __future__ import annotations

from torch import nn

from isogrid.errors import IsogridError
from isogrid.linear.layer import StructuredLinear

MEMORY = ("fast", "small")


def limit_memory(model: nn.Module, memory: str) -> nn.Module:
    """Let a model's structured layers keep what makes them fast, or nothing beside their factors.

    Args:
        model: with structured layers; changed in place.
        memory: "fast": a layer that multiplies faster densely keeps the dense matrix (`StructuredLinear.plan`), and
            factors that a product reads in another order are kept in that order. "small": neither is kept, and what is
            kept now is let go; `StructuredLinear.memory` is then the factors and the bias.

    Returns:
        The model.

    Raises:
        IsogridError: another word.
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
