"""What is computed from a factor alone and kept as long as the factor stays as it is: weights in another order."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isogrid.kernels.native import PLAIN

Make = Callable[[Tensor], Tensor]


@dataclass
class _Kept:
    source: weakref.ref[Tensor]
    state: tuple[int, int]
    values: dict[object, Tensor] = field(default_factory=dict)


_KEPT: dict[int, _Kept] = {}


def derived(source: Tensor, key: object, make: Make) -> Tensor:
    """``make(source)``, from the last time if the source is the same tensor, unchanged, and nothing differentiates.

    Args:
        source: a factor.
        key: what is made; tells one derived tensor of a source from another.
        make: a function of the source and of what the key says, nothing else.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(source) not in PLAIN:
        return make(source)
    if source.is_inference() or torch.is_inference_mode_enabled():
        return make(source)  # what is made here can't be used outside, or can't be known to be current
    if torch.is_grad_enabled() and source.requires_grad:
        return make(source)
    place, state = id(source), (source._version, source.data_ptr())
    kept = _KEPT.get(place)
    if kept is None or kept.source() is not source or kept.state != state:
        kept = _KEPT[place] = _Kept(weakref.ref(source, lambda _: _KEPT.pop(place, None)), state)
    if key not in kept.values:
        kept.values[key] = make(source).detach().contiguous()
    return kept.values[key]


def derived_bytes(source: Tensor) -> int:
    """Bytes that are kept beside a factor."""
    kept = _KEPT.get(id(source))
    if kept is None or kept.source() is not source:
        return 0
    return sum(value.nbytes for value in kept.values.values())


def forget(source: Tensor) -> None:
    """Let go of what is kept beside a factor."""
    _KEPT.pop(id(source), None)
