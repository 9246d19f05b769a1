"""Smaller dense layers in the place of pruned ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.linear.coupled import Coupled, Producer
from isogrid.linear.dense_layers import linear_matrix


@dataclass(frozen=True)
class Cut:
    """One parameter that has become smaller.

    Attributes:
        old: the parameter before.
        new: the one in its place; None where the whole layer is gone.
        dim: along which it was cut.
        index: what was kept of it.
    """

    old: nn.Parameter
    new: nn.Parameter | None
    dim: int
    index: Tensor


class NoAttention(nn.Module):
    """Stands where an attention has no heads left: gives its output layer's bias.

    Caches still learn how many tokens have passed, by one number a token. ``output_attentions`` gives the maps of the
    other layers.

    Args:
        attention: whose attributes (its place in the model, its config) are taken over.
        writer: name and layer of its output, of no inputs; None where another module holds it.
    """

    def __init__(self, attention: nn.Module, writer: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        for key, value in vars(attention).items():
            if not key.startswith("_"):
                setattr(self, key, value)
        self.writer = None if writer is None else writer[0]
        if writer is not None:
            self.add_module(*writer)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """``(..., hidden)`` to the bias in the same shape, or zeros; ``(..., 0)`` where another module holds it."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            passed = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(passed, passed, self.layer_idx)
        nothing = hidden_states[..., :0]
        return nothing if self.writer is None else getattr(self, self.writer)(nothing), None


def shrink(
    model: nn.Module,
    one: Coupled,
    kept: Sequence[int] | Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Cut]:
    """Keep some structures of a module, in place; works without numbers (meta device) too.

    Args:
        model: holds the module.
        one: the module, as `find_coupled` describes it now.
        kept: indices of structures, ascending, maybe none.
        weight: ``(out, kept columns)`` of the writer; None: its own columns.
        bias: of the writer; None: its own. A writer without one gains one.

    Returns:
        The parameters that were cut, and those that are gone with the last head. Nothing has changed where an error is
        raised.

    Raises:
        IsogridError: indices that are no ascending structures, or a weight of another size.
    """
    index = torch.as_tensor(kept, dtype=torch.int64)
    if index.ndim != 1 or (len(index) and (index[0] < 0 or index[-1] >= one.units)) or (index.diff() <= 0).any():
        raise IsogridError(
            f"{one.name!r} has {one.units} {one.unit}s; kept are ascending indices, got {index.tolist()}"
        )
    holder = model.get_submodule(one.holder)
    cuts: list[Cut] = []
    layers: list[tuple[str, nn.Module]] = []
    for producer in one.producers:
        layers.append(
            (producer.layer, _rows_kept(model.get_submodule(producer.layer), producer, one.units, index, cuts))
        )
    columns = one.columns(index)
    writer = _columns_kept(one.writer, model.get_submodule(one.writer), columns, weight, bias, cuts)
    layers.append((one.writer, writer))
    # All new layers are there: from here nothing can fail.
    if one.kind == "attention" and len(index) == 0:
        inside = one.writer.startswith(f"{one.holder}.")
        name = one.writer.removeprefix(f"{one.holder}.")
        model.set_submodule(one.holder, NoAttention(holder, (name, writer) if inside else None))
        if not inside:
            model.set_submodule(one.writer, writer)
        alive, known = {id(value) for value in model.parameters()}, {id(cut.old) for cut in cuts}
        others = [value for value in holder.parameters() if id(value) not in alive | known]  # norms over heads
        gone = [Cut(value, None, 0, torch.zeros(0, dtype=torch.int64)) for value in others]
        return [cut if id(cut.new) in alive else replace(cut, new=None) for cut in cuts] + gone
    for name, layer in layers:
        model.set_submodule(name, layer)
    for key, amount in one.counts.items():
        setattr(holder, key, amount * len(index))
    return cuts


def _rows_kept(layer: nn.Module, producer: Producer, units: int, kept: Tensor, cuts: list[Cut]) -> nn.Module:
    rows = producer.rows(units, kept)
    bias: Any = layer.bias
    new = _layer_like(layer, len(rows), linear_matrix(layer).shape[1], bias is not None)
    _cut(layer.weight, new, "weight", _output_dim(layer), rows, cuts)
    if bias is not None:
        _cut(bias, new, "bias", 0, rows, cuts)
    return new.train(layer.training)


def _columns_kept(
    name: str, layer: nn.Module, columns: Tensor, weight: Tensor | None, bias: Tensor | None, cuts: list[Cut]
) -> nn.Module:
    out = linear_matrix(layer).shape[0]
    own: Any = layer.bias
    if bias is not None and tuple(bias.shape) != (out,):
        raise IsogridError(f"layer {name!r} has {out} outputs, its bias is {tuple(bias.shape)}")
    new = _layer_like(layer, out, len(columns), own is not None or bias is not None)
    if weight is not None:
        if tuple(weight.shape) != (out, len(columns)):
            raise IsogridError(f"layer {name!r} becomes {out} x {len(columns)}, its weight is {tuple(weight.shape)}")
        weight = weight if isinstance(layer, nn.Linear) else weight.mT
    _cut(
        layer.weight, new, "weight", 1 - _output_dim(layer), columns, cuts, weight, turned=type(new) is not type(layer)
    )
    if own is not None or bias is not None:
        numbers = own.detach() if bias is None else bias
        like: Any = layer.weight
        wanted = like.requires_grad if own is None else own.requires_grad
        new.bias = nn.Parameter(numbers.to(like).clone(), wanted)
        if own is not None:
            cuts.append(Cut(own, new.bias, 0, torch.arange(out)))
    return new.train(layer.training)


def _cut(
    old: Any,
    new: nn.Module,
    key: str,
    dim: int,
    index: Tensor,
    cuts: list[Cut],
    numbers: Tensor | None = None,
    *,
    turned: bool = False,
) -> None:
    kept = old.detach().index_select(dim, index.to(old.device)) if numbers is None else numbers.to(old)
    parameter = nn.Parameter(kept.mT.contiguous() if turned else kept.contiguous(), old.requires_grad)
    setattr(new, key, parameter)
    cuts.append(Cut(old, parameter, dim, index))


def _output_dim(layer: nn.Module) -> int:
    return 0 if isinstance(layer, nn.Linear) else 1


def _layer_like(layer: nn.Module, out_features: int, in_features: int, bias: bool) -> nn.Module:
    """A layer of the same kind, its numbers still to come."""
    # A Conv1D can't multiply by a matrix without inputs.
    if isinstance(layer, nn.Linear) or in_features == 0:
        new = nn.Linear(1, 1, bias=bias, device="meta")  # torch warns of layers that begin without numbers
        new.in_features, new.out_features = in_features, out_features
        return new
    with torch.device("meta"):
        return type(layer)(out_features, in_features)
