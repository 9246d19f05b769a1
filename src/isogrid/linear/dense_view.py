"""A layer's dense matrix as a tensor that is computed when its numbers are used, and when a kept one is stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isogrid.kernels.native import PLAIN

if TYPE_CHECKING:
    from isogrid.linear.layer import StructuredLinear

# Reading these of a dense view costs nothing; everything else needs the numbers.
_METADATA: frozenset[Any] = frozenset(
    {
        *(vars(torch._C.TensorBase)[name].__get__ for name in ("dtype", "device", "shape", "ndim", "layout")),
        *(vars(torch._C.TensorBase)[name].__get__ for name in ("is_cuda", "is_meta")),
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
    }
)


class DenseView(torch.Tensor):
    """A layer's dense ``(out, in)`` matrix that is computed when its numbers are first used.

    Libraries read ``layer.weight.dtype`` or ``.device`` on every forward pass (T5, PEFT); that must cost nothing. Any
    other use multiplies the factors out, under autograd where they require it.
    """

    _materialize: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, layer: StructuredLinear) -> DenseView:
        """A view that has the layer's sizes, dtype and device, and no storage."""
        like = layer.floating_factor()
        view = torch.Tensor._make_wrapper_subclass(
            cls, (layer.out_features, layer.in_features), dtype=like.dtype, device=like.device
        )
        view._materialize = layer.dense
        return view

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata from the view itself, everything else from the dense matrix."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # transformers initialises whatever has a weight: that must reach neither a factor nor the kept matrix.
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        args, kwargs = torch.utils._pytree.tree_map_only(
            DenseView,
            lambda view: view._materialize().clone() if writes else view._materialize(),
            (args, kwargs or {}),
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached by code that bypasses ``__torch_function__``."""
        args, kwargs = torch.utils._pytree.tree_map_only(
            DenseView, lambda view: view._materialize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Snapshot:
    """Which tensors the factors were, and in which state.

    Weak references, since an id is used again when its tensor is gone; the storage's address beside the version, since
    ``parameter.data = …`` changes the one and not the other.
    """

    def __init__(self, factors: Mapping[str, Tensor]) -> None:
        self.seen = [(weakref.ref(value), *self._state(value)) for value in factors.values()]

    @staticmethod
    def _state(value: Tensor) -> tuple[int, int]:
        local = value.to_local() if type(value) not in PLAIN and hasattr(value, "to_local") else value
        return value._version, local.data_ptr()

    def is_current(self, factors: Mapping[str, Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        for (reference, version, place), value in zip(self.seen, factors.values(), strict=True):
            if reference() is not value or self._state(value) != (version, place):
                return False
        return True
