"""The tensors that hold a format's numbers: what they are, and what is done to them under any format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from isogrid.formats.base import Format

Role = Literal["weight", "gain", "structure", "index", "code"]
TRAINABLE: frozenset[str] = frozenset({"weight", "gain", "structure"})
Factors = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Factor:
    """What one tensor of a format is.

    Attributes:
        shape: its sizes.
        dtype: None for the layer's floating dtype; an integer dtype for indices and codes.
        role: "weight", "gain" and "structure" are trained (the last two without decay); "index" and "code" are
            buffers that ``.to(dtype)`` leaves alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    role: Role = "weight"

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def trainable(self) -> bool:
        """Whether it becomes a parameter."""
        return self.role in TRAINABLE


def new_factors(
    fmt: Format,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Factors:
    """Uninitialised tensors for all factors of an ``(out, in)`` matrix."""
    return {
        name: torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
        for name, spec in fmt.factors(out_features, in_features).items()
    }


def prefixed(prefix: str, factors: Mapping[str, T]) -> dict[str, T]:
    """Factors of a part under the names they have in the whole."""
    return {prefix + name: value for name, value in factors.items()}


def unprefixed(prefix: str, factors: Mapping[str, T]) -> dict[str, T]:
    """The factors of one part, under the names the part knows."""
    return {name.removeprefix(prefix): value for name, value in factors.items() if name.startswith(prefix)}


def balanced_norms(factors: Factors) -> Factors:
    """Factors of a product scaled to equal Frobenius norms; the product is unchanged."""
    norms = [float(value.norm()) for value in factors.values()]
    if min(norms) == 0:
        return factors
    mean = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return {name: value * (mean / norm) for (name, value), norm in zip(factors.items(), norms, strict=True)}
