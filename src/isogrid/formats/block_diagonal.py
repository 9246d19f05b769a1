"""Block-diagonal: independent dense blocks along the diagonal, optionally with the inputs dealt out first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, cholesky
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.formulations import Formulation, block_diagonal_einsum, block_diagonal_published
from isogrid.formats.sizes import pad_matrix
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits
from isogrid.kernels import one_stage


@dataclass(frozen=True)
class BlockDiagonal(Format):
    """``blocks`` dense matrices along the diagonal: out · in / blocks parameters.

    Sizes that ``blocks`` does not divide are padded with zeros. The cheapest product of all formats, and the poorest
    class of matrices: inputs of one block never reach the outputs of another.

    Attributes:
        blocks: number of blocks; fewer cost more.
        shuffle: deal the inputs out to the blocks in turn (input j to block j mod blocks) instead of in runs.
    """

    blocks: int = 4
    shuffle: bool = False

    name: ClassVar[str] = "block_diagonal"
    open_field: ClassVar[str] = "blocks"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, optimal_under_metric=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise IsogridError(f"block_diagonal: blocks is a positive integer, got {self.blocks!r}")

    def _sizes(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(out_block, in_block)."""
        return -(-out_features // self.blocks), -(-in_features // self.blocks)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``diagonal (blocks, out_block, in_block)``."""
        return {"diagonal": Factor((self.blocks, *self._sizes(out_features, in_features)))}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """One batched product."""
        diagonal = factors["diagonal"]
        return one_stage(x, diagonal, in_turn=self.shuffle, features=out_features, bias=bias)

    def _grouped(self, rows: Tensor, blocks: int) -> Tensor:
        """``(rows, blocks · in_block) -> (rows, blocks, in_block)``."""
        if self.shuffle:
            return rows.view(rows.shape[0], rows.shape[1] // blocks, blocks).transpose(1, 2)
        return rows.view(rows.shape[0], blocks, rows.shape[1] // blocks)

    def formulations(self) -> dict[str, Formulation]:
        """As its paper writes it, and as einsum."""
        if self.shuffle:  # dealt out in turn: no paper writes that
            return {}
        return {"published": block_diagonal_published, "einsum": block_diagonal_einsum}

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``diagonal``."""
        out_block, in_block = self._sizes(out_features, in_features)
        return [Component("diagonal", in_block, out_block, self.blocks * out_block)]

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """The fewest blocks that fit."""
        most = max(min(out_features, in_features), 1)
        for blocks in range(1, most + 1):
            member = replace(self, blocks=blocks)
            if budget.allows(member.cost(out_features, in_features, budget.dtype)):
                return member
        return super(BlockDiagonal, replace(self, blocks=most)).sized(out_features, in_features, budget)

    def candidates(self, out_features: int, in_features: int, budget: Budget) -> Iterable[Self]:
        """With inputs in runs and dealt out."""
        for shuffle in (False, True):
            yield from super(BlockDiagonal, replace(self, shuffle=shuffle)).candidates(
                out_features, in_features, budget
            )

    def solve(self, target: Tensor, metric: Metric | None, *, solver: str, **options: Any) -> Factors:
        """Cut the blocks out; under a metric, ``(T M)[I, J] M[J, J]⁻¹`` per block: the global minimum either way."""
        require_solver(self, solver, ("default", "projection"))
        b = self.blocks
        out_block, in_block = self._sizes(*target.shape)
        padded = pad_matrix(target, b * out_block, b * in_block)
        order = self._grouped(torch.arange(b * in_block, device=target.device).unsqueeze(0), b)[0]  # (b, in_block)
        if metric is not None and solver == "default":
            moment = metric.padded(b * in_block).matrix
            padded = padded @ moment
        rows = padded.view(b, out_block, b * in_block)
        diagonal = torch.stack([rows[i][:, order[i]] for i in range(b)])  # (b, out_block, in_block)
        if metric is not None and solver == "default":
            own = torch.stack([moment[order[i]][:, order[i]] for i in range(b)])
            diagonal = torch.cholesky_solve(diagonal.mT, cholesky(own)).mT
        return {"diagonal": diagonal}
