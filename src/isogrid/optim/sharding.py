"""Rows of a matrix that one rank holds, and the two sums that a sharded projection needs.

FSDP2 shards a parameter along its first dimension. With ``G`` cut into row blocks, ``G X`` is a gather of ``G_i X``
and ``Gᵀ Y`` a sum of ``G_iᵀ Y_i``: what travels is as thin as the subspace, never the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.kernels.subspaces import Scalar, scalar

DISTRIBUTED = torch.distributed.is_available()
if DISTRIBUTED:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of ``total`` are here; ``group`` holds the others, None where all are here."""

    total: int
    start: int
    stop: int
    group: Any = None

    def part(self, tensor: Tensor) -> Tensor:
        """Of ``(total, q)`` the rows of this rank."""
        return tensor if self.group is None else tensor[self.start : self.stop]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor that each holds a part of."""
        if self.group is not None:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def sum_number(self, number: Scalar, like: Tensor) -> Scalar:
        """The sum over ranks of a number of each.

        Args:
            number: this rank's.
            like: gives dtype and device of what travels.
        """
        if self.group is None:
            return number
        return scalar(self.sum(torch.as_tensor(number, dtype=like.dtype, device=like.device).clone()))

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over ranks of each entry."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """``(total, q)`` from each rank's rows; blocks may differ in height, so they are summed into zeros."""
        if self.group is None:
            return tensor
        whole = tensor.new_zeros(self.total, tensor.shape[1])
        whole[self.start : self.stop] = tensor
        return self.sum(whole)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return DISTRIBUTED and isinstance(tensor, DTensor)


def overall_norm(values: Tensor) -> Tensor:
    """The Frobenius norm: not finite where an entry isn't, or where its square, which Adam forms anyway, isn't.

    One pass without a copy; the largest magnitude would say the same and takes ten times as long on a CPU.
    """
    # The square of 300 is beyond float16.
    wide = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(values, dtype=wide)


def rows_of(parameter: Tensor, name: str) -> Rows:
    """The rows of a parameter on this rank.

    Raises:
        IsogridError: a DTensor that is sharded along another dimension than the first, or along several mesh axes.
    """
    total = parameter.shape[0] if parameter.ndim else 1
    if not is_sharded(parameter):
        return Rows(total, 0, total)
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    sharded = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if any(placements[axis] != Shard(0) for axis in sharded) or len(sharded) > 1:
        raise IsogridError(
            f"{name}: placements {placements} can't be projected; shard along dimension 0 over one mesh axis (FSDP2)"
        )
    if not sharded:
        return Rows(total, 0, total)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    start = min(offset[0], total)
    return Rows(total, start, start + shape[0], mesh.get_group(sharded[0]))


@dataclass(frozen=True)
class Share:
    """How a state with a row for each row of a parameter lies on the ranks: as the parameter does.

    Attributes:
        parameter: the parameter.
        rows: those that are here.
    """

    parameter: Tensor
    rows: Rows

    def wrap(self, values: Tensor) -> Tensor:
        """``values (rows here, ...)`` as a DTensor of all rows, placed as the parameter; itself if that is none."""
        if not is_sharded(self.parameter):
            return values
        return DTensor.from_local(
            values,
            self.parameter.device_mesh,  # type: ignore[attr-defined]
            self.parameter.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=torch.Size((self.rows.total, *values.shape[1:])) if values.ndim else values.shape,
            stride=values.stride(),
        )


@dataclass(frozen=True)
class GradientMatrix:
    """A gradient ``(rows, columns)`` of which ``values (rows here, columns)`` is on this rank.

    Attributes:
        values: float32 or float64.
        rows: which rows these are.
    """

    values: Tensor
    rows: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole."""
        return self.rows.total, self.values.shape[1]

    def times(self, x: Tensor) -> Tensor:
        """``G x``, ``(rows, q)``, whole on every rank."""
        return self.rows.gather(self.values @ x)

    def transposed_times(self, y: Tensor) -> Tensor:
        """``Gᵀ y``, ``(columns, q)``, whole on every rank."""
        return self.rows.sum(self.values.mT @ self.rows.part(y))

    def products(self, side: str) -> tuple[Product, Product]:
        """``A x`` and ``Aᵀ y`` for ``A = G`` (left) or ``A = Gᵀ`` (right): from these a basis is found."""
        return (self.times, self.transposed_times) if side == "left" else (self.transposed_times, self.times)

    def whole(self) -> Tensor:
        """All rows, gathered: what an exact decomposition needs."""
        return self.rows.gather(self.values)

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm, a scalar tensor."""
        return self.rows.sum(self.values.square().sum())
