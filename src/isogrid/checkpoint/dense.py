"""Models with structured layers made dense again: in place, or as a copy that any reader takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint.layers import check_untied, mark_structured, structured_places
from isogrid.checkpoint.pruned import describe_pruned, padded
from isogrid.errors import IsogridError
from isogrid.linear import StructuredLinear, is_linear


def merge(model: nn.Module) -> nn.Module:
    """Multiply every structured layer out, in place: afterwards the model is dense, and saves as one.

    A layer becomes what its architecture has in this place: an ``nn.Linear``, in a GPT-2 a ``Conv1D``. One without a
    trained factor stays frozen.

    Returns:
        The model.

    Raises:
        IsogridError: a structured layer alone, one whose weight the config ties to another, or a transformers model
            that its config alone doesn't build.
    """
    if isinstance(model, StructuredLinear):
        raise IsogridError("merge changes the layers within a model; of a single layer take layer.merge()")
    structured = structured_places(model)
    check_untied(model, structured)
    transposed = _transposed_places(model) if structured else {}
    merged: dict[tuple[int, type[nn.Module] | None], nn.Module] = {}
    for name, module in structured.items():
        kind = transposed.get(name)
        if (id(module), kind) not in merged:
            layer = module.merge() if kind is None else _transposed(module.merge(), kind)
            layer.requires_grad_(any(value.requires_grad for value in module.parameters()))
            merged[id(module), kind] = layer
    for name, module in structured.items():
        model.set_submodule(name, merged[id(module), transposed.get(name)])
    mark_structured(model)
    return model


def dense_copy(model: Any) -> Any:
    """A dense transformers model that computes the same: structured layers multiplied out, the rest shared.

    Pruned modules get zeros in the place of what they have lost, so that any reader of the architecture takes them.

    Raises:
        IsogridError: not a transformers model, one that its config alone doesn't build, one with a structured layer
            whose weight the config ties to another, or one that has gained what the architecture has no place for.
    """
    if not hasattr(model, "save_pretrained"):
        raise IsogridError(f"{type(model).__name__} is not a transformers model")
    structured = structured_places(model)
    check_untied(model, structured)
    skeleton = _skeleton(model)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in structured or name.endswith(".bias"):
            state[name] = value
    for name, module in structured.items():
        place = skeleton.get_submodule(name)
        matrix = module.dense().detach()
        state[f"{name}.weight"] = (matrix if isinstance(place, nn.Linear) else matrix.mT).contiguous().clone()
        if module.bias is not None and place.bias is None:
            raise IsogridError(
                f"layer {name!r} has gained a bias that a dense {type(place).__name__} here does not have; "
                "compress or prune without new biases (--no-bias of isogrid prune) for a dense export"
            )
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, _ in _conv1d(skeleton):
        if isinstance(modules.get(name), nn.Linear):
            state[f"{name}.weight"] = state[f"{name}.weight"].mT.contiguous()
    state = padded(state, skeleton, describe_pruned(model))
    missing, unexpected = skeleton.load_state_dict(state, strict=False, assign=True)
    skeleton.tie_weights()
    untied = [key for key in missing if key not in (getattr(skeleton, "all_tied_weights_keys", None) or {})]
    if untied or unexpected:
        raise IsogridError(f"the model differs from its config: missing {untied[:3]}, unexpected {unexpected[:3]}")
    # Buffers that no file holds (rotary frequencies) were built without numbers; the model has them.
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, key = name.rpartition(".")
        place = skeleton.get_submodule(owner)
        if key in place._buffers and place._buffers[key] is not None and place._buffers[key].is_meta:
            place._buffers[key] = buffer
    if getattr(model, "generation_config", None) is not None:
        skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton.train(model.training)


def _skeleton(model: Any) -> Any:
    """The dense model of the same class and config, without numbers."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return type(model)(config)
    except TypeError as error:
        raise IsogridError(
            f"{type(model).__name__} can't be built from its config alone ({error}), which would tell how its layers "
            "are stored; of each layer take model.set_submodule(name, layer.merge())"
        ) from None


def _conv1d(skeleton: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a dense model that hold their matrix transposed."""
    return (
        (name, module)
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if is_linear(module) and not isinstance(module, nn.Linear)
    )


def _transposed_places(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Where the architectures of a model's transformers parts have a ``Conv1D``, and which class that is."""
    found: dict[str, type[nn.Module]] = {}
    outer: list[str] = []
    for name, part in model.named_modules():
        # By name: importing transformers to compare classes would cost every user seconds.
        known = any(kind.__name__ == "PreTrainedModel" for kind in type(part).__mro__)
        if not known or any(name.startswith(one) for one in outer):
            continue
        start = f"{name}." if name else ""
        outer.append(start)
        found |= {start + place: type(layer) for place, layer in _conv1d(_skeleton(part))}
    return found


def _transposed(layer: nn.Module, kind: Any) -> nn.Module:
    """A dense layer as one of the kind that holds its matrix transposed; that always has a bias."""
    weight: Any = layer.weight
    bias: Any = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias
    with torch.device("meta"):
        turned = kind(*weight.shape)
    turned.weight = nn.Parameter(weight.detach().mT.contiguous())
    turned.bias = nn.Parameter(bias.detach())
    return turned.train(layer.training)
