"""Coupled structures of transformers: which rows and columns of which layers belong to one head or channel.

An attention or feed-forward module has producers, whose outputs are its inner activations, and one writer, which brings
these back to the residual stream. A structure (a head, a group of heads that share keys and values, a channel) is a
block of columns of the writer and the rows of the producers that make them: all of it goes, or nothing.

Found from the modules themselves, by the names and sizes of their layers: attention with ``q_proj, k_proj, v_proj,
o_proj`` (Llama, Mistral, Qwen, ViT; grouped keys and values too), ``c_attn, c_proj`` (GPT-2) and BERT's ``query, key,
value``; feed-forwards with ``gate_proj, up_proj, down_proj``, ``c_fc, c_proj``, ``fc1, fc2`` and BERT's ``intermediate,
output``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.fitting import columns_of
from isogrid.linear.dense_layers import is_linear, linear_matrix
from isogrid.linear.layer import StructuredLinear


@dataclass(frozen=True)
class Producer:
    """A layer whose outputs are inner activations.

    Attributes:
        layer: its name.
        width: outputs of one structure.
        parts: equal parts of the outputs, each with all structures: 3 where queries, keys and values are one layer.
    """

    layer: str
    width: int
    parts: int = 1

    def rows(self, units: int, kept: Tensor) -> Tensor:
        """The outputs that belong to some of ``units`` structures."""
        within = columns_of(kept, self.width)
        return (torch.arange(self.parts, device=within.device)[:, None] * units * self.width + within).flatten()


@dataclass(frozen=True)
class Coupled:
    """An attention or feed-forward module, as structures.

    Attributes:
        name: in the model.
        kind: "attention" or "feed_forward".
        units: how many structures it has.
        heads: query heads of one structure; 0 of a channel.
        width: inputs of the writer that are one structure's.
        producers: the layers whose rows go with it.
        writer: the layer whose columns go with it.
        holder: the module that knows the number of structures and, of an attention, gives way when none is left.
        counts: the holder's attributes that count structures, with how much one structure adds.
    """

    name: str
    kind: str
    units: int
    heads: int
    width: int
    producers: tuple[Producer, ...]
    writer: str
    holder: str
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all its layers."""
        return (*(one.layer for one in self.producers), self.writer)

    def columns(self, kept: Tensor) -> Tensor:
        """The writer's inputs that belong to some structures."""
        return columns_of(kept, self.width)

    @property
    def unit(self) -> str:
        """What one structure is called."""
        return "channel" if self.kind == "feed_forward" else "head" if self.heads == 1 else "group"


@dataclass(frozen=True)
class Refused:
    """An attention or feed-forward module whose structures can't be cut.

    Attributes:
        kind: "attention" or "feed_forward".
        why: in words, with what can be done.
    """

    kind: str
    why: str


def find_coupled(model: nn.Module, wanted: Container[str] | None = None) -> dict[str, Coupled]:
    """The attention and feed-forward modules of a model, by name, in the order the model defines them.

    Args:
        model: any.
        wanted: names of modules that matter; None: all. Others are missing where they can't be cut.

    Raises:
        IsogridError: none is found, or of one that matters sizes don't fit together, layers are shared with another
            module or hold structured factors; names the layer.
    """
    found, refused = survey_coupled(model)
    for name, one in refused.items():
        if wanted is None or name in wanted:
            raise IsogridError(one.why)
    return found


def survey_coupled(model: nn.Module) -> tuple[dict[str, Coupled], dict[str, Refused]]:
    """As `find_coupled`; and beside them those that can't be cut, by name too.

    Raises:
        IsogridError: there is no module of either kind.
    """
    found: dict[str, Coupled] = {}
    refused: dict[str, Refused] = {}
    for name, module in model.named_modules():
        for read, kind, inside in READERS:
            try:
                one = read(name, module)
            except IsogridError as error:
                refused[f"{name}{inside}"] = Refused(kind, str(error))
                break
            if one is not None:
                found[one.name] = one
                break
    if not found and not refused:
        raise IsogridError(
            f"{type(model).__name__} has no attention or feed-forward modules that are known here (the layers q_proj, "
            "k_proj, v_proj, o_proj and gate_proj, up_proj, down_proj, or those of BERT, ViT and GPT-2)"
        )
    for name, why in _shared(model, found).items():
        refused[name] = Refused(found.pop(name).kind, why)
    return found, refused


def _separate(name: str, module: nn.Module) -> Coupled | None:
    if any(getattr(module, key, False) for key in ("store_full_length_kv", "is_kv_shared_layer")):
        raise IsogridError(
            f"attention {name!r} has its keys and values in common with other layers (num_kv_shared_layers); cut, its "
            "heads would not be theirs any more: it can't be pruned"
        )
    layers = _linear(name, module, "q_proj", "k_proj", "v_proj", "o_proj")
    return None if layers is None else _attention(name, module, layers, f"{name}.o_proj", name)


def _bert_attention(name: str, module: nn.Module) -> Coupled | None:
    inner, outer = getattr(module, "self", None), getattr(module, "output", None)
    if not isinstance(inner, nn.Module) or not isinstance(outer, nn.Module):
        return None
    layers = _linear(f"{name}.self", inner, "query", "key", "value")
    writer = _linear(f"{name}.output", outer, "dense")
    if layers is None or writer is None:
        return None
    return _attention(name, inner, layers | writer, f"{name}.output.dense", f"{name}.self")


def _attention(name: str, module: nn.Module, layers: dict[str, nn.Module], writer: str, holder: str) -> Coupled:
    """Queries, keys and values in layers of their own."""
    query, key, value = (layer for layer in layers if layer != writer)
    head = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    if not isinstance(head, int):
        raise IsogridError(f"attention {name!r} doesn't say how wide a head is (head_dim); it can't be pruned")
    sizes = {layer: linear_matrix(layers[layer]).shape for layer in layers}
    for layer in (query, key):
        if sizes[layer][0] % head:
            raise IsogridError(f"layer {layer!r} has {sizes[layer][0]} outputs, no whole number of heads of {head}")
    heads, groups = sizes[query][0] // head, sizes[key][0] // head
    if groups == 0 or heads % groups:
        raise IsogridError(
            f"attention {name!r} has {heads} heads over {groups} groups of keys and values, which don't divide them; "
            "it can't be pruned"
        )
    if sizes[value] != sizes[key] or sizes[writer][1] != sizes[query][0]:
        raise IsogridError(
            f"attention {name!r}: {value!r} {tuple(sizes[value])} or {writer!r} {tuple(sizes[writer])} doesn't fit to "
            f"{heads} heads of {head}; its heads are not separate and can't be pruned"
        )
    _refuse_extras(name, module, layers, head)
    each = heads // groups
    counts = {"num_heads": each, "num_attention_heads": each, "num_key_value_heads": 1, "all_head_size": each * head}
    producers = (Producer(query, each * head), Producer(key, head), Producer(value, head))
    known = {key: amount for key, amount in counts.items() if isinstance(getattr(module, key, None), int)}
    return Coupled(name, "attention", groups, each, each * head, producers, writer, holder, known)


def _fused(name: str, module: nn.Module) -> Coupled | None:
    layers = _linear(name, module, "c_attn", "c_proj")
    if layers is None:
        return None
    fused, writer = layers
    if isinstance(layers[fused], nn.Linear):  # the Conv1Ds of GPT-2 and its kin have three equal parts
        raise IsogridError(
            f"attention {name!r}: how the queries, keys and values lie in the {linear_matrix(layers[fused]).shape[0]} "
            f"outputs of {fused!r} is not known here (GPT-BigCode interleaves them by head); it can't be pruned"
        )
    outputs, width = linear_matrix(layers[fused]).shape[0], linear_matrix(layers[writer]).shape[1]
    head = getattr(module, "head_dim", None)
    if not isinstance(head, int) or outputs != 3 * width or width % head:
        raise IsogridError(
            f"attention {name!r}: {fused!r} has {outputs} outputs, queries, keys and values of {width} are expected "
            "(cross-attention can't be pruned)"
        )
    _refuse_extras(name, module, layers, head)
    known = {
        key: amount
        for key, amount in {"num_heads": 1, "split_size": head}.items()
        if isinstance(getattr(module, key, None), int)
    }
    return Coupled(name, "attention", width // head, 1, head, (Producer(fused, head, parts=3),), writer, name, known)


def _gated(name: str, module: nn.Module) -> Coupled | None:
    layers = _linear(name, module, "gate_proj", "up_proj", "down_proj")
    return None if layers is None else _feed_forward(name, module, layers, name)


def _plain(name: str, module: nn.Module) -> Coupled | None:
    for names in (("c_fc", "c_proj"), ("fc1", "fc2")):
        layers = _linear(name, module, *names)
        if layers is not None:
            return _feed_forward(name, module, layers, name)
    return None


def _bert_feed_forward(name: str, module: nn.Module) -> Coupled | None:
    inner, outer = getattr(module, "intermediate", None), getattr(module, "output", None)
    if not isinstance(inner, nn.Module) or not isinstance(outer, nn.Module):
        return None
    first, last = _linear(f"{name}.intermediate", inner, "dense"), _linear(f"{name}.output", outer, "dense")
    if first is None or last is None:
        return None
    return _feed_forward(f"{name}.intermediate", inner, first | last, f"{name}.intermediate")


def _feed_forward(name: str, module: nn.Module, layers: dict[str, nn.Module], holder: str) -> Coupled:
    *first, writer = layers
    units = linear_matrix(layers[writer]).shape[1]
    for layer in first:
        if linear_matrix(layers[layer]).shape[0] != units:
            raise IsogridError(
                f"layer {layer!r} has {linear_matrix(layers[layer]).shape[0]} outputs, {writer!r} {units} inputs; "
                "its channels can't be pruned"
            )
    if getattr(module, "activation_sparsity", 0):
        raise IsogridError(
            f"feed-forward {name!r} lets through what stands out among all its channels (activation_sparsity); fewer "
            "would be others: it can't be pruned"
        )
    _refuse_norms(name, module, units, linear_matrix(layers[writer]).shape[0])
    known = {"intermediate_size": 1} if isinstance(getattr(module, "intermediate_size", None), int) else {}
    producers = tuple(Producer(layer, 1) for layer in first)
    return Coupled(name, "feed_forward", units, 0, 1, producers, writer, holder, known)


def _linear(name: str, module: nn.Module, *wanted: str) -> dict[str, nn.Module] | None:
    """The layers of these names, or None where one is missing or of no size."""
    layers: dict[str, nn.Module] = {}
    for key in wanted:
        layer: Any = getattr(module, key, None)
        if isinstance(layer, StructuredLinear):
            raise IsogridError(f"layer {name}.{key} is held in {layer.format.label()}; prune first, then compress")
        if not isinstance(layer, nn.Module) or not is_linear(layer) or linear_matrix(layer).numel() == 0:
            return None
        layers[f"{name}.{key}"] = layer
    return layers


def _refuse_extras(name: str, module: nn.Module, layers: Mapping[str, nn.Module], head: int) -> None:
    """Norms over one head are the same for all; anything larger would have to be cut too."""
    known = {id(value) for layer in layers.values() for value in layer.parameters()}
    for key, value in module.named_parameters():
        # A number for each head may look like one over a head where there are as many: that one is in a norm.
        if id(value) not in known and not (tuple(value.shape) == (head,) and "." in key):
            raise IsogridError(
                f"attention {name!r} has a parameter {key!r} {tuple(value.shape)} that heads may share; "
                "how it is cut is not known here"
            )


def _refuse_norms(name: str, module: nn.Module, units: int, outputs: int) -> None:
    """Norms over all channels (BitNet, Kosmos-2) would have to be cut too, and would be others."""
    if units == outputs:  # norms of the residual stream are as long
        return
    biases = {id(layer.bias) for layer in module.modules() if is_linear(layer)}
    for key, value in module.named_parameters():
        if tuple(value.shape) == (units,) and id(value) not in biases:
            raise IsogridError(
                f"feed-forward {name!r} has a parameter {key!r} {tuple(value.shape)} over its channels; how it is cut "
                "is not known here"
            )


def _shared(model: nn.Module, found: Mapping[str, Coupled]) -> dict[str, str]:
    """Modules that can't be cut alone, and why."""
    modules = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    weights = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*declared, *(declared[key] for key in declared)}
    refused: dict[str, str] = {}
    for one in found.values():
        for layer in one.layers:
            module = model.get_submodule(layer)
            if modules[id(module)] > 1 or weights[id(module.weight)] > 1 or f"{layer}.weight" in tied:
                refused[one.name] = (
                    f"layer {layer!r} shares its weight with another module; cut, both would change: untie it first"
                )
                break
    return refused


# In this order: what reads a module, the kind it reads, and where inside of a module of that kind its name lies.
READERS: tuple[tuple[Callable[[str, nn.Module], Coupled | None], str, str], ...] = (
    (_separate, "attention", ""),
    (_fused, "attention", ""),
    (_bert_attention, "attention", ""),
    (_gated, "feed_forward", ""),
    (_plain, "feed_forward", ""),
    (_bert_feed_forward, "feed_forward", ".intermediate"),
)
