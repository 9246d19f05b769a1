"""What a checkpoint says about its structured layers, and the marks that keep other readers from guessing.

A compressed model's ``config.json`` holds ``quantization_config`` with ``quant_method: "isogrid"`` and one entry per
structured layer. Its ``model.safetensors`` holds the factors under ``<layer>.<factor>`` and, per layer, an empty tensor
``<layer>.weight``: a reader that doesn't know Isogrid stops at its shape instead of starting from random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint.pruned import PrunedEntry, describe_pruned, spellings
from isogrid.errors import CheckpointError, IsogridError
from isogrid.formats import Format, format_from_dict
from isogrid.linear import StructuredLinear, check_memory, is_linear, linear_matrix

QUANT_METHOD = "isogrid"
FORMAT_VERSION = 1
# No matrix of any model comes near; a larger size in a file is an attack or damage, met before memory is asked for.
LARGEST_SIDE = 2**24
MARK = "weight"


@dataclass(frozen=True)
class LayerEntry:
    """One structured layer as config.json describes it."""

    format: Format
    in_features: int
    out_features: int
    bias: bool
    small_memory: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        described = {
            "format": self.format.to_dict(),
            "in": self.in_features,
            "out": self.out_features,
            "bias": self.bias,
        }
        return described | ({"memory": "small"} if self.small_memory else {})

    def build(self, dtype: torch.dtype, device: torch.device | str = "meta") -> StructuredLinear:
        """The layer, without numbers on the meta device."""
        layer = StructuredLinear(
            self.in_features, self.out_features, self.format, bias=self.bias, device=device, dtype=dtype
        )
        layer.small_memory = self.small_memory
        return layer

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors the file must hold."""
        shapes = {name: spec.shape for name, spec in self.format.factors(self.out_features, self.in_features).items()}
        return shapes | ({"bias": (self.out_features,)} if self.bias else {})


def structured_places(model: nn.Module) -> dict[str, StructuredLinear]:
    """The structured layers of a model, under every name that each has."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StructuredLinear)
    }


def describe_layers(model: nn.Module) -> dict[str, LayerEntry]:
    """The structured layers of a model."""
    return {
        name: LayerEntry(
            module.format, module.in_features, module.out_features, module.bias is not None, module.small_memory
        )
        for name, module in structured_places(model).items()
    }


def config_of(
    layers: Mapping[str, LayerEntry], default: Format | None = None, pruned: Mapping[str, PrunedEntry] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of these layers and pruned modules."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "default": None if default is None else default.to_dict(),
        "layers": {name: entry.to_dict() for name, entry in layers.items()},
        "pruned": {name: entry.to_dict() for name, entry in (pruned or {}).items()},
    }


def parse_config(config: Any, source: str) -> dict[str, LayerEntry]:
    """The layers that a ``quantization_config`` describes, checked before anything is built.

    Raises:
        CheckpointError: not Isogrid's, a newer version, or an entry that makes no sense; names it.
    """
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{source} is not a checkpoint with structured layers (no quant_method 'isogrid')")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION or version < 1:
        raise CheckpointError(
            f"{source} has checkpoint format version {version!r}, this Isogrid reads up to {FORMAT_VERSION}; "
            "upgrade isogrid"
        )
    layers = config.get("layers")
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"{source}: 'layers' is missing from quantization_config")
    return {name: _parse_entry(name, entry, source) for name, entry in layers.items()}


def _parse_entry(name: str, entry: Any, source: str) -> LayerEntry:
    try:
        sizes = entry["in"], entry["out"]
        if not all(isinstance(size, int) and 0 < size <= LARGEST_SIDE for size in sizes):
            raise CheckpointError(f"{source}: layer {name!r} has sizes {sizes}, not in 1 … {LARGEST_SIDE}")
        memory = entry.get("memory", "fast")
        check_memory(memory)
        fmt = format_from_dict(entry["format"])
        parsed = LayerEntry(fmt, entry["in"], entry["out"], bool(entry["bias"]), memory == "small")
        parsed.tensors()
    except RecursionError:
        raise CheckpointError(f"{source}: layer {name!r}: its format is nested too deeply") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: layer {name!r} has an incomplete entry ({error})") from None
    except CheckpointError:
        raise
    except IsogridError as error:
        raise CheckpointError(f"{source}: layer {name!r}: {error}") from None
    return parsed


def attach_layers(model: nn.Module, layers: Mapping[str, LayerEntry], source: str) -> dict[str, str]:
    """Put empty structured layers (meta device) in the places of a dense model's linear layers.

    Names may carry or lack the prefix of a base model, as transformers' own names do.

    Args:
        model: the dense skeleton; changed in place, unless something is wrong.
        layers: what the checkpoint describes.
        source: where it lies, for messages.

    Returns:
        Stored name to name in this model.

    Raises:
        CheckpointError: the model has no such layer, one of other sizes, or one that it ties to another weight.
    """
    prefix = getattr(model, "base_model_prefix", "")
    resolved: dict[str, str] = {}
    for name, entry in layers.items():
        place = _find_layer(model, name)
        if place is None:
            if prefix and not name.startswith(f"{prefix}."):
                # a layer of a head that this model doesn't have
                continue
            raise CheckpointError(
                f"{source}: layer {name!r} is not in {type(model).__name__}; the checkpoint belongs to another model"
            )
        shape = tuple(matrix_like(model.get_submodule(place)).shape)
        if shape != (entry.out_features, entry.in_features):
            raise CheckpointError(
                f"{source}: layer {name!r} is {entry.out_features} x {entry.in_features}, in {type(model).__name__} "
                f"it is {shape[0]} x {shape[1]}; the checkpoint belongs to another model"
            )
        resolved[name] = place
    if layers and not resolved:
        raise CheckpointError(f"{source}: none of its layers is in {type(model).__name__}; it belongs to another model")
    try:
        check_untied(model, resolved.values())
    except IsogridError as error:
        raise CheckpointError(f"{source}: {error}") from None
    # A layer that stands in several places stays one.
    replaced = {name: model.get_submodule(place) for name, place in resolved.items()}
    built: dict[tuple[int, str], StructuredLinear] = {}
    for name, place in resolved.items():
        old, entry = replaced[name], layers[name]
        key = id(old), repr(entry)
        if key not in built:
            trained = any(value.requires_grad for value in old.parameters(recurse=False))
            built[key] = entry.build(matrix_like(old).dtype).requires_grad_(trained)
        model.set_submodule(place, built[key])
    return resolved


def check_untied(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise IsogridError where a transformers model's config ties one of these layers to another weight.

    Whoever reads the model would put the other weight in the layer's place: an output head would lose its factors.
    """
    if not hasattr(model, "save_pretrained"):
        return
    held = set(layers)
    for name, part in model.named_modules():
        tied = getattr(part, "all_tied_weights_keys", None)
        if not tied or not getattr(part.config, "tie_word_embeddings", False):
            continue
        for key, source in tied.items():
            layer = f"{name}.{key}".lstrip(".").removesuffix(f".{MARK}")
            if layer in held:
                raise IsogridError(
                    f"layer {layer!r} is structured, but the config ties its weight to {source!r}; set "
                    "tie_word_embeddings to False in the config, or leave the layer dense"
                )


def matrix_like(module: nn.Module) -> Tensor:
    """Something with the sizes, dtype and device of a layer's matrix; nothing is multiplied out."""
    return module.weight if isinstance(module, StructuredLinear) else linear_matrix(module)


def _find_layer(model: nn.Module, name: str) -> str | None:
    for candidate in spellings(model, name):
        try:
            place = model.get_submodule(candidate)
            if is_linear(place) or isinstance(place, StructuredLinear):
                return candidate
        except AttributeError:
            continue
    return None


def mark_structured(
    model: nn.Module, default: Format | None = None, pruned: Mapping[str, PrunedEntry] | None = None
) -> None:
    """Make a transformers model with structured or pruned layers save itself as one; any other is left as it is.

    Its config gets the ``quantization_config``, its state dict the empty marks.

    Args:
        model: any.
        default: the format that most layers have.
        pruned: its pruned modules; None: those that its config names.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    known = getattr(config, "quantization_config", None)
    if default is None and isinstance(known, Mapping) and known.get("default"):
        default = format_from_dict(known["default"])
    layers = describe_layers(model)
    pruned = describe_pruned(model) if pruned is None else pruned
    if layers or pruned:
        config.quantization_config = config_of(layers, default, pruned)
        if layers and not any(hook is _add_marks_hook for hook in model._state_dict_hooks.values()):
            model.register_state_dict_post_hook(_add_marks_hook)
    elif known is not None:
        del config.quantization_config


def add_marks(model: nn.Module, state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Put the empty mark of every structured layer into a state dict."""
    for name, module in structured_places(model).items():
        like = module.floating_factor()
        device = "cpu" if like.is_meta else like.device
        state_dict[f"{prefix}{name}.{MARK}"] = torch.empty(0, dtype=like.dtype, device=device)


def _add_marks_hook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    add_marks(module, state_dict, prefix)
