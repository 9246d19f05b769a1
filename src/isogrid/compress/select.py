"""Which layers of a model are rewritten."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from isogrid.errors import IsogridError
from isogrid.linear import StructuredLinear, is_linear, linear_matrix


def select_layers(
    model: nn.Module, select: str | Iterable[str] | None = None, skip: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The linear layers to rewrite, by name, in the order the model defines them.

    Args:
        model: any module with ``nn.Linear`` or transformers ``Conv1D`` inside.
        select: patterns of layer names: shell wildcards over the whole name (``"*.mlp.*"``) or a last name
            (``"q_proj"``). None: the layers inside the model's repeated blocks (its ``nn.ModuleList``s), which is
            what the field's ratios count; in a model without blocks all linear layers. ``"*"`` takes every layer.
        skip: patterns of layers to leave alone.

    Layers whose weight is shared with another module (tied heads) and output heads are never taken by default. A head
    is what ``get_output_embeddings`` names: where a model has neither that nor blocks, skip its last layer by name.

    Raises:
        IsogridError: a pattern matches no layer (near names are suggested), a selected layer is tied, or nothing is
            left.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if name
        and is_linear(module)
        and linear_matrix(module).numel()  # nothing is left of a layer that was pruned away
    }
    structured = sum(isinstance(module, StructuredLinear) for module in model.modules())
    if is_linear(model):
        raise IsogridError("this is a single layer; use StructuredLinear.from_linear, or put it into a module")
    if not linear and structured:
        raise IsogridError(f"its {structured} linear layers are structured already; start from the dense model")
    if not linear:
        raise IsogridError(f"{type(model).__name__} has no linear layers inside; there is nothing to rewrite")
    tied = _tied(model, linear)
    if select is None:
        chosen = [name for name in _in_blocks(model, linear) if name not in tied]
    else:
        chosen = _matching(linear, select)
        for name in chosen:
            if name in tied and not _is_wildcard_only(select, name):
                raise IsogridError(
                    f"layer {name!r} shares its weight with another module and must stay dense; leave it out of select"
                )
        chosen = [name for name in chosen if name not in tied]
    skipped = set(_matching(linear, skip))
    chosen = [name for name in chosen if name not in skipped]
    if not chosen and structured and select is None and not skipped:
        raise IsogridError(
            f"its {structured} layers are structured already; start from the dense model or export it dense"
        )
    if not chosen:
        raise IsogridError("select and skip leave no layer to rewrite")
    return {name: linear[name] for name in chosen}


def _matching(linear: dict[str, nn.Module], patterns: str | Iterable[str]) -> list[str]:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    found: set[str] = set()
    for pattern in wanted:
        hits = {name for name in linear if fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern}
        if not hits:
            last = sorted({name.rpartition(".")[2] for name in linear})
            near = difflib.get_close_matches(pattern, [*linear, *last], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"last names: {', '.join(last)}"
            raise IsogridError(f"no linear layer matches {pattern!r}; {hint}")
        found |= hits
    return [name for name in linear if name in found]


def _is_wildcard_only(patterns: str | Iterable[str], name: str) -> bool:
    """Whether a layer was caught by wildcards alone, not asked for by name."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    return not any(pattern in (name, name.rpartition(".")[2]) for pattern in wanted)


def _in_blocks(model: Any, linear: dict[str, nn.Module]) -> list[str]:
    """Layers inside repeated blocks; all of them where there are no blocks. Output heads stay out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    blocks = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
    )
    # A model whose blocks are compressed already has blocks: its heads are no less heads for that.
    inside = [name for name in linear if not blocks or name.startswith(blocks)]
    return [name for name in inside if linear[name] is not head]


def _tied(model: Any, linear: dict[str, nn.Module]) -> set[str]:
    """Layers whose module or weight is reached by more than one name."""
    modules = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    weights = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    declared: set[str] = set()
    for pair in getattr(model, "all_tied_weights_keys", None) or {}:
        declared.add(pair)
        declared.add(model.all_tied_weights_keys[pair])
    return {
        name
        for name, module in linear.items()
        if modules[id(module)] > 1 or weights[id(module.weight)] > 1 or f"{name}.weight" in declared
    }
