"""BlockDense: block-diagonal on the inputs, then one dense matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, balance, fit_slices, leading_left, rank_bound
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.sizes import pad_matrix
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits
from isogrid.kernels import block_dense_product


@dataclass(frozen=True)
class BlockDense(Format):
    """``W = left · blockdiag(right)``: each run of in / blocks inputs gets a rank-``rank`` matrix over all outputs.

    ``right (blocks, rank, in_block)``, ``left (out, blocks · rank)``: blocks · rank · (in_block + out) parameters
    (structured feed-forward layers, Wei et al. 2024). One block is low rank.

    Attributes:
        rank: rank of the columns of one block; None until `sized`.
        blocks: number of runs of inputs.
    """

    rank: int | None = None
    blocks: int = 4

    name: ClassVar[str] = "block_dense"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, monotone_in_budget=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise IsogridError(f"block_dense: blocks is a positive integer, got {self.blocks!r}")

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The smaller side of a block of columns: there every matrix is a member."""
        return min(out_features, -(-in_features // self.blocks))

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``right (blocks, rank, in_block)``, ``left (out, blocks · rank)``."""
        rank = require_rank(self, self.rank, self.size_limit(out_features, in_features))
        return {
            "right": Factor((self.blocks, rank, -(-in_features // self.blocks))),
            "left": Factor((out_features, self.blocks * rank)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """Blocked product, dense product."""
        return block_dense_product(x, factors["right"], factors["left"], bias)

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``right``, then ``left``."""
        rank = require_rank(self, self.rank)
        hidden = self.blocks * rank
        return [
            Component("right", -(-in_features // self.blocks), rank, hidden),
            Component("left", hidden, out_features, out_features),
        ]

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """The matrix has rank ``blocks · rank`` at most."""
        return rank_bound(target, self.blocks * require_rank(self, self.rank), metric)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        on_step: OnStep | None,
        sweeps: int = 3,
        tolerance: float = 1e-3,
        **options: Any,
    ) -> Factors:
        """One truncated SVD per block of columns (global optimum); exact block descent over them under a metric.

        Solvers: default; "projection" ignores the metric. Options: ``sweeps`` (3) and ``tolerance`` (1e-3).
        """
        require_solver(self, solver, ("default", "projection"))
        rank = require_rank(self, self.rank)
        in_block = -(-target.shape[1] // self.blocks)
        padded = pad_matrix(target, target.shape[0], self.blocks * in_block)
        columns = padded.view(1, target.shape[0], self.blocks, in_block).transpose(1, 2)  # (1, blocks, out, in_block)
        ranks = torch.full((1, self.blocks), rank, device=target.device)
        if metric is None or solver == "projection":
            u = leading_left(columns, rank)
            left, right = balance(u, u.mT @ columns)
        else:
            left, right = fit_slices(
                columns,
                ranks,
                metric.padded(self.blocks * in_block),
                sweeps=sweeps,
                tolerance=tolerance,
                on_step=on_step,
            )
        return {
            "right": right[0],
            "left": left[0].transpose(0, 1).reshape(target.shape[0], self.blocks * rank),
        }
