"""What a checkpoint says about its pruned modules: how many structures each has kept.

``quantization_config["pruned"]`` holds an entry for every attention or feed-forward module that is smaller than the
rest of ``config.json`` says. The loader cuts the skeleton to these sizes before a tensor is read; a reader that doesn't
know Isogrid stops at the first shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import CheckpointError, IsogridError
from isogrid.linear import find_coupled, linear_matrix, shrink


@dataclass(frozen=True)
class PrunedEntry:
    """One pruned module as config.json describes it.

    Attributes:
        units: heads, groups of heads or channels that are left.
        of: how many there were.
        bias: whether its last layer has gained a bias.
    """

    units: int
    of: int
    bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


def describe_pruned(model: nn.Module) -> dict[str, PrunedEntry]:
    """The pruned modules of a model, as its config knows them; by the model's own names.

    A whole model and its base share a config, and the one that was marked last has written its names there.
    """
    known = getattr(getattr(model, "config", None), "quantization_config", None)
    entries = parse_pruned(known, "the model's config") if isinstance(known, Mapping) else {}
    if not entries:
        return {}
    names = {name for name, _ in model.named_modules()}
    return {
        next((place for place in spellings(model, name) if place in names), name): entry
        for name, entry in entries.items()
    }


def spellings(model: nn.Module, name: str) -> tuple[str, str, str]:
    """What a module or tensor of a checkpoint may be called in a model: its name, without a base's prefix, with it."""
    prefix = getattr(model, "base_model_prefix", "")
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def parse_pruned(config: Mapping[str, Any], source: str) -> dict[str, PrunedEntry]:
    """The pruned modules that a ``quantization_config`` describes, checked before anything is built.

    Raises:
        CheckpointError: an entry that makes no sense; names it.
    """
    entries = config.get("pruned") or {}
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{source}: 'pruned' in quantization_config is no table of modules")
    found: dict[str, PrunedEntry] = {}
    for name, entry in entries.items():
        sizes = (entry.get("units"), entry.get("of")) if isinstance(entry, Mapping) else (None, None)
        whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
        if len(whole) != 2 or not 0 <= whole[0] <= whole[1]:
            raise CheckpointError(f"{source}: pruned module {name!r} keeps {sizes[0]!r} of {sizes[1]!r}; no such sizes")
        found[name] = PrunedEntry(whole[0], whole[1], bool(entry.get("bias", False)))
    return found


def attach_pruned(
    model: nn.Module, entries: Mapping[str, PrunedEntry], source: str
) -> tuple[list[str], dict[str, PrunedEntry]]:
    """Cut the modules of a skeleton to the sizes of a checkpoint, in place.

    Returns:
        Names of the layers that were cut and have to be in the file, and the entries by the model's own names, without
        those of a head that it doesn't have.

    Raises:
        CheckpointError: the model has no such module, or one of another size.
    """
    if not entries:
        return [], {}
    prefix = getattr(model, "base_model_prefix", "")
    try:
        known = find_coupled(model, {key for name in entries for key in spellings(model, name)})
    except IsogridError as error:
        raise CheckpointError(f"{source}: {error}") from None
    cut: list[str] = []
    resolved: dict[str, PrunedEntry] = {}
    for name, entry in entries.items():
        place = next((key for key in spellings(model, name) if key in known), None)
        if place is None and prefix and not name.startswith(f"{prefix}."):
            continue  # of a head that this model doesn't have
        if place is None or known[place].units != entry.of:
            has = "none" if place is None else f"one of {known[place].units}"
            raise CheckpointError(
                f"{source}: module {name!r} had {entry.of} {'units' if place is None else known[place].unit + 's'} "
                f"before it was pruned, {type(model).__name__} has {has}; the checkpoint belongs to another model"
            )
        if place in resolved:
            raise CheckpointError(f"{source}: module {place!r} is described twice, once as {name!r}; prune it anew")
        one, resolved[place] = known[place], entry
        bias = None
        if entry.bias:
            bias = torch.empty(linear_matrix(model.get_submodule(one.writer)).shape[0], device="meta")
        with torch.device("cpu"):  # skeletons are built on the meta device; indices have numbers
            shrink(model, one, range(entry.units), bias=bias)
        cut += one.layers if entry.units or one.kind == "feed_forward" else (one.writer,)
    return cut, resolved


def check_cut(model: nn.Module, cut: Iterable[str], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise CheckpointError where a file holds a cut layer's tensor in another shape; names may lack a base's prefix.

    Args:
        model: the cut skeleton.
        cut: names of its cut layers.
        shapes: of the file's tensors.
        source: where they lie, for messages.
    """
    for name in cut:
        for key, value in model.get_submodule(name).named_parameters(recurse=False):
            for one in spellings(model, f"{name}.{key}"):
                if one in shapes and shapes[one] != tuple(value.shape):
                    raise CheckpointError(
                        f"{source}: {one} has shape {shapes[one]}, config.json asks for {tuple(value.shape)}; "
                        "the two files don't belong together"
                    )


def padded(state: Mapping[str, Tensor], skeleton: nn.Module, entries: Mapping[str, PrunedEntry]) -> dict[str, Tensor]:
    """The numbers of a pruned model for its full skeleton: zeros in the place of what is gone compute the same.

    Raises:
        IsogridError: a layer has gained a bias that the skeleton has no place for.
    """
    out = dict(state)
    known = find_coupled(skeleton, entries) if entries else {}
    for name, entry in entries.items():
        if name not in known:
            continue  # of a head that this model doesn't have
        one, kept = known[name], torch.arange(entry.units)
        for producer in one.producers:
            _pad(out, skeleton, producer.layer, rows=producer.rows(one.units, kept))
        _pad(out, skeleton, one.writer, columns=one.columns(kept))
        if entry.units == 0 and one.kind == "attention":  # its norms are gone, too
            like = next(iter(out.values()))
            for key, value in skeleton.get_submodule(one.holder).named_parameters():
                out.setdefault(f"{one.holder}.{key}", torch.ones(value.shape, dtype=like.dtype, device=like.device))
    return out


def _pad(
    state: dict[str, Tensor],
    skeleton: nn.Module,
    name: str,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    layer: Any = skeleton.get_submodule(name)
    transposed = not isinstance(layer, nn.Linear)
    small, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    like = next(iter(state.values())) if small is None else small
    full = torch.zeros(linear_matrix(layer).shape, dtype=like.dtype, device=like.device)
    if small is not None and small.numel():
        small = small.mT if transposed else small
        full[slice(None) if rows is None else rows, slice(None) if columns is None else columns] = small
    state[f"{name}.weight"] = (full.mT if transposed else full).contiguous()
    if layer.bias is None:
        if bias is not None:
            raise IsogridError(
                f"layer {name!r} has gained a bias that a dense {type(layer).__name__} here does not have; "
                "prune with how=How(bias=False), or --no-bias, for a dense export"
            )
    elif rows is not None:
        wide = torch.zeros(full.shape[0], dtype=like.dtype, device=like.device)
        if bias is not None:
            wide[rows] = bias
        state[f"{name}.bias"] = wide
