"""What gradients and states must be before a step moves anything; kernels of torch check none of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError


def projects(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether the group's options project this parameter."""
    return group["rank"] is not None and group["projector"] != "top" and parameter.ndim >= 2


def require_usable(name: str, group: Mapping[str, Any], parameter: Tensor) -> None:
    """Refuse a gradient that no step can take.

    Raises:
        IsogridError: it is sparse or of another shape than its parameter, or the group's options can't step it.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise IsogridError(
            f"{name}: its gradient is sparse ({gradient.layout}); use sparse=False in the embedding, "
            "or torch.optim.SparseAdam for it"
        )
    if gradient.shape != parameter.shape:
        raise IsogridError(f"{name}: its gradient has shape {tuple(gradient.shape)}; call zero_grad() after a change")
    if group["adaptive"] is not None and group["projector"] == "identity":
        raise IsogridError(f"{name}: the projector 'identity' never changes; leave adaptive out")


def require_fit(
    name: str, parameter: Tensor, state: Mapping[str, Any], remedy: str, group: Mapping[str, Any] | None = None
) -> None:
    """Refuse a state that is not the parameter's.

    Args:
        name: of the parameter, for messages.
        parameter: the parameter.
        state: of a step of its own or of a checkpoint; an empty one fits.
        remedy: what is to be done, for messages.
        group: whose options must be of the state's kind; None where the state brings its own.

    Raises:
        IsogridError: the state is of another shape, or of a projection where there is none.
    """
    if not state or parameter.numel() == 0:
        return
    rows = parameter.shape[0] if parameter.ndim else 1
    shape = (rows, parameter.numel() // rows)
    if "rows" in state:
        found = (state["rows"], state["columns"])
        if found != shape:
            raise IsogridError(f"{name}: the state is of a {found[0]} x {found[1]} matrix; {remedy}")
    elif "exp_avg" in state and state["exp_avg"].shape != parameter.shape:
        raise IsogridError(f"{name}: the state has shape {tuple(state['exp_avg'].shape)}; {remedy}")
    if group is not None and projects(group, parameter) != ("rows" in state):
        raise IsogridError(
            f"{name}: the state is of a step {'in a subspace' if 'rows' in state else 'without a subspace'}; {remedy}"
        )
