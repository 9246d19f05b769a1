"""Other forms of a whole model's layers, and what is saved of them."""

from __future__ import annotations

import torch
from torch import nn

from isogrid.checkpoint.layers import mark_structured
from isogrid.errors import IsogridError
from isogrid.linear import StructuredLinear, limit_memory


@torch.no_grad()
def deploy(model: nn.Module) -> list[str]:
    """Put the inference form of their factors into a model's structured layers, in place; it computes the same.

    Caps and gains, which training needs, are folded into the factors (`Format.deploy`). Training goes on from the new
    factors as from any others; a layer without a trained one stays frozen.

    Returns:
        The names of the layers that have another format now.

    Raises:
        IsogridError: the model is itself a structured layer.
    """
    made: dict[int, StructuredLinear] = {}
    found: dict[str, StructuredLinear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, StructuredLinear):
            continue
        if id(module) not in made:
            sizes = module.out_features, module.in_features
            form, factors = module.format.deploy(module.factors, *sizes)
            if form == module.format:
                continue
            if not name:
                raise IsogridError(
                    "deploy changes the layers within a model; of a single layer take "
                    "layer.format.deploy(layer.factors, out_features, in_features)"
                )
            bias = None if module.bias is None else module.bias.detach()
            held = {key: value.detach() for key, value in factors.items()}
            layer = StructuredLinear.from_factors(form, held, *sizes, bias=bias).train(module.training)
            layer.requires_grad_(any(value.requires_grad for value in module.parameters()))
            layer.product, layer.small_memory = module.product, module.small_memory
            made[id(module)] = layer
        found[name] = made[id(module)]
    for name, layer in found.items():
        model.set_submodule(name, layer)
    mark_structured(model)
    return list(found)


def set_memory(model: nn.Module, memory: str) -> nn.Module:
    """Let a model's structured layers keep what makes them fast, or nothing beside their factors.

    Args:
        model: with structured layers; changed in place. What is said here is saved with it.
        memory: "fast": a layer that multiplies faster densely keeps the dense matrix (`StructuredLinear.plan`), and
            factors that a product reads in another order are kept in that order. "small": neither is kept, and what is
            kept now is let go; `StructuredLinear.memory` is then the factors and the bias.

    Returns:
        The model.

    Raises:
        IsogridError: another word.
    """
    limit_memory(model, memory)
    mark_structured(model)
    return model
