"""The products in C++: one pass over a tile of rows, the intermediate in the cache.

Built at the first use. Where they can't be, one warning says why, and the portable products serve.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from isogrid.errors import IsogridWarning
from isogrid.kernels.native.build import shared_object, unsuitable

# Tensors that are nothing but numbers in memory: no subclass stands between.
PLAIN: frozenset[type] = frozenset({Tensor, torch.nn.Parameter})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOADING = threading.Lock()
_found: frozenset[torch.dtype] | None = None
# How far the trial product of each dtype may be from the true one, relative to it.
TRUSTED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def loaded() -> frozenset[torch.dtype]:
    """The dtypes that native products take here; none where there are no native products."""
    found = _found
    if found is None:
        with _LOADING:
            found = _load() if _found is None else _found
    return found


def _load() -> frozenset[torch.dtype]:
    global _found
    _found = frozenset()  # also where a warning is made an error: nothing is tried twice
    if unsuitable() is None:
        try:
            torch.ops.load_library(str(shared_object()))
        except OSError as error:
            warnings.warn(f"no native products, the portable ones are slower: {error}", IsogridWarning, stacklevel=3)
            return _found
        _register_shapes()
        # PyTorch's block products throw on some processors, and on others give garbage: a trial tells.
        _found = frozenset(dtype for dtype in DTYPES if _is_right(dtype))
    return _found


def takes(x: Tensor, *factors: Tensor) -> bool:
    """Whether the native products take these: plain CPU tensors of one dtype that they know."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    if torch.compiler.is_compiling():
        # An exported program goes to other machines: it gets the portable products.
        return not torch.compiler.is_exporting() and _compiles(x.dtype) and all(v.dtype == x.dtype for v in factors)
    if type(x) not in PLAIN or torch._C._are_functorch_transforms_active():
        return False
    for value in factors:
        if value.dtype != x.dtype or value.device.type != "cpu" or type(value) not in PLAIN:
            return False
    return x.dtype in loaded()


@torch.compiler.assume_constant_result
def _compiles(dtype: torch.dtype) -> bool:
    return dtype in loaded()


def _is_right(dtype: torch.dtype) -> bool:
    source = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(*size, generator=source) for size in ((20, 36), (2, 8, 18), (4, 9, 4)))
    hidden = torch.einsum("bkp,kqp->bkq", x.view(20, 2, 18), first).reshape(20, 4, 4)
    wanted = torch.einsum("brl,lsr->bls", hidden, second).reshape(20, 36)
    try:
        found = torch.ops.isogrid.two_stage(
            x.to(dtype), first.to(dtype), second.to(dtype), None, (2, 4), False, False, 36
        )
    except RuntimeError:
        return False
    return float((found.float() - wanted).norm() / wanted.norm()) < TRUSTED[dtype]


def _register_shapes() -> None:
    """What the products give, for compilers and exporters."""

    def rows(x: Tensor, *others: Any) -> Tensor:
        return x.new_empty(x.shape[0], others[-1])

    def gradients(g: Tensor, *others: Any) -> tuple[Tensor, ...]:
        wanted = others[-1]
        return tuple(
            torch.empty_like(value) if asked else value.new_empty(0)
            for value, asked in zip(others, wanted, strict=False)
        )

    shapes: dict[str, Callable[..., Any]] = {
        "columns": lambda x, order, first: (
            x.new_empty(x.shape[0], first),
            x.new_empty(x.shape[0], x.shape[1] - first),
        ),
        "sparse": lambda x, values, mask: rows(x, mask.shape[0]),
        "trits": lambda x, codes, scales, group, thirds: rows(x, codes.shape[0]),
        "trit_matrix": lambda codes, scales, columns, group, thirds: scales.new_empty(codes.shape[0], columns),
        "trit_sums": lambda codes, values, planes, group, thirds: values.new_empty(
            codes.shape[0], -(-values.shape[1] // group), planes
        ),
    }
    for name in (
        "blocked",
        "two_stage",
        "blast",
    ):  # their outputs are the last argument, what is wanted of gradients too
        shapes |= {name: rows, f"{name}_backward": gradients}
    for name, shape in shapes.items():
        library.register_fake(f"isogrid::{name}", shape)
