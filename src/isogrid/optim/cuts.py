"""An optimizer follows parameters that have become smaller, its state cut as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.linear import Cut


def follow_cuts(optimizer: torch.optim.Optimizer, cuts: Iterable[Cut]) -> None:
    """Put the new parameters in the places of the old ones, in place.

    Of a state, tensors of the parameter's shape (moments) are cut as the parameter was, those with one number for each
    row or column (factored moments) where that dimension was cut; single numbers stay.
    Parameters that are gone leave their groups; groups without any are dropped.

    Args:
        optimizer: holds the old parameters, or some of them.
        cuts: what `isogrid.linear.shrink` returned, oldest first.

    Raises:
        IsogridError: a state of another shape, such as a projection's bases; the optimizer has then not changed.
    """
    cuts = list(cuts)
    places = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    states: list[tuple[Cut, dict[str, Any]]] = []
    for cut in cuts:
        if id(cut.old) in places:
            state = optimizer.state.get(cut.old, {})
            if "rows" in state:  # a random projection stores no basis, and moments of one direction look like a row
                raise IsogridError(
                    f"the optimizer's projection of a parameter {tuple(cut.old.shape)} can't be cut with it; "
                    "begin a new optimizer"
                )
            states.append((cut, {key: _cut_state(key, value, cut) for key, value in state.items()}))
    for cut, state in states:
        group = places[id(cut.old)]
        at = next(index for index, value in enumerate(group["params"]) if value is cut.old)
        optimizer.state.pop(cut.old, None)
        if cut.new is None or not cut.new.numel():  # nothing is left to train
            del group["params"][at]
            continue
        group["params"][at] = cut.new
        if state:
            optimizer.state[cut.new] = state
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _cut_state(key: str, value: Any, cut: Cut) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    shape, index = tuple(cut.old.shape), cut.index.to(value.device)
    if tuple(value.shape) == shape:
        kept = value.index_select(cut.dim, index)
        # A Conv1D without inputs has become an nn.Linear, its matrix turned.
        return kept if cut.new is None or kept.shape == cut.new.shape else kept.mT.contiguous()
    of_dimension = [dim for dim, size in enumerate(shape) if value.shape in _factored(shape, dim, size)]
    if len(of_dimension) == 1:
        dim = of_dimension[0]
        along = dim if value.ndim == 2 else 0
        return value.index_select(along, index) if dim == cut.dim else value
    raise IsogridError(
        f"the optimizer's {key!r} {tuple(value.shape)} of a parameter {shape} can't be cut with it; "
        "begin a new optimizer"
    )


def _factored(shape: tuple[int, ...], dim: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a state that holds one number for each place of a dimension of a matrix."""
    if len(shape) != 2:
        return ()
    return (size,), ((size, 1), (1, size))[dim]
