"""Monarch: two block-diagonal matrices with the stride permutation between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, fit_slices, project_slices, rank_bound
from isogrid.formats.base import Format
from isogrid.formats.block_tensor_train import BlockTensorTrain
from isogrid.formats.checks import require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.formulations import Formulation, monarch_einsum, monarch_published
from isogrid.formats.sizes import pad_matrix, stride_order
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits
from isogrid.kernels import pad_features, two_stage


@dataclass(frozen=True)
class Monarch(Format):
    """A ``blocks`` x ``blocks`` grid of slices of low rank; rows of a slice are strided, columns contiguous.

    ``right (blocks, hidden, in_block)`` mixes inside contiguous input blocks, the hidden units are dealt out in turn,
    ``left (blocks, out_block, hidden)`` mixes again (Dao et al. 2022, general rectangular form). Sizes that ``blocks``
    does not divide are padded with zeros. blocks · hidden · (in_block + out_block) parameters.

    Attributes:
        blocks: number of blocks of both factors.
        rank: rank of every slice, ``hidden = rank · blocks``. None: the published layer rule, ``hidden`` the smaller
            block side, which halves a square layer at 4 blocks.
    """

    blocks: int = 4
    rank: int | None = None

    name: ClassVar[str] = "monarch"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, monotone_in_budget=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise IsogridError(f"monarch: blocks is a positive integer, got {self.blocks!r}")
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise IsogridError(f"monarch: rank is a positive integer or None, got {self.rank!r}")

    def _sizes(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """(out_block, hidden, in_block)."""
        out_block, in_block = -(-out_features // self.blocks), -(-in_features // self.blocks)
        hidden = min(out_block, in_block) if self.rank is None else self.rank * self.blocks
        return out_block, hidden, in_block

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``right (blocks, hidden, in_block)``, ``left (blocks, out_block, hidden)``."""
        out_block, hidden, in_block = self._sizes(out_features, in_features)
        return {
            "right": Factor((self.blocks, hidden, in_block)),
            "left": Factor((self.blocks, out_block, hidden)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """Blocked product, stride permutation, blocked product."""
        right, left = factors["right"], factors["left"]
        return two_stage(x, right, left, interleave=True, features=out_features, bias=bias)

    def formulations(self) -> dict[str, Formulation]:
        """As its paper writes it, and as einsum."""
        return {"published": monarch_published, "einsum": monarch_einsum}

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``right``, then ``left``."""
        out_block, hidden, in_block = self._sizes(out_features, in_features)
        return [
            Component("right", in_block, hidden, self.blocks * hidden),
            Component("left", hidden, out_block, self.blocks * out_block),
        ]

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The smaller side of a slice: there every matrix is a member."""
        out_block, _, in_block = self._sizes(out_features, in_features)
        return min(out_block, in_block)

    def slice_ranks(self, out_features: int, in_features: int) -> Tensor:
        """``(blocks, blocks)`` rank of slice (row group, column group); they differ by one under the layer rule."""
        _, hidden, _ = self._sizes(out_features, in_features)
        group = torch.arange(self.blocks)
        first = (group.unsqueeze(1) - group * hidden) % self.blocks  # first hidden unit of (row group, column group)
        return ((hidden - first + self.blocks - 1) // self.blocks).clamp(min=0)

    def _directions(self, hidden: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(blocks · hidden,)`` each: row group, column group, and number within their slice, of every hidden unit."""
        unit = torch.arange(self.blocks * hidden, device=device)
        a, c = unit % self.blocks, unit // hidden
        return a, c, (unit % hidden - (a - c * hidden) % self.blocks) // self.blocks

    def rewritten(
        self, to: Format, factors: Mapping[str, Tensor], out_features: int, in_features: int
    ) -> tuple[Format, Factors] | None:
        """A Block Tensor-Train over the same slices, where ``blocks`` divides both sizes.

        Its rows are contiguous where ours are strided, so it comes as `Permuted`; its rank is that of the largest
        slice, or a larger one that ``to`` asks for. The numbers are moved, none is computed: the others are zero.
        """
        from isogrid.formats.permuted import Permuted  # it imports this module for its default

        train = to.inner if isinstance(to, Permuted) else to
        b = self.blocks
        if not isinstance(train, BlockTensorTrain) or out_features % b or in_features % b:
            return None
        needed = int(self.slice_ranks(out_features, in_features).max())
        asked = train.rank if train.rank != BlockTensorTrain.rank else needed
        if train != BlockTensorTrain(train.rank) or asked < needed:
            return None
        out_block, hidden, in_block = self._sizes(out_features, in_features)
        right, left = factors["right"], factors["left"]
        a, c, j = self._directions(hidden, right.device)
        first = right.new_zeros(b, b, asked, in_block)  # (column group, row group, direction, input)
        first[c, a, j] = right.reshape(b * hidden, in_block)
        last = left.new_zeros(b, b, asked, out_block)  # (row group, column group, direction, output)
        last[a, c, j] = left.permute(2, 0, 1).reshape(b * hidden, out_block)
        grid = BlockTensorTrain(asked, out_factors=(b, out_block), in_factors=(b, in_block))
        return Permuted(grid), {
            "input_order": torch.arange(in_features, dtype=torch.int32, device=right.device),
            "output_order": stride_order(out_features, out_block).to(right.device, torch.int32),
            "inner_right": first.permute(0, 3, 1, 2).reshape(b, in_block, b * asked),
            "inner_left": last.reshape(b, b * asked, out_block),
        }

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """A row group has at most its slices' ranks together; without a metric each slice counts alone."""
        out_block, _, in_block = self._sizes(*target.shape)
        ranks = self.slice_ranks(*target.shape).to(target.device)
        rows = pad_matrix(target, self.blocks * out_block, target.shape[1]).view(out_block, self.blocks, -1)
        if metric is not None:
            return rank_bound(rows.transpose(0, 1), ranks.sum(1), metric)
        slices = pad_features(rows, self.blocks * in_block).view(out_block, self.blocks, self.blocks, in_block)
        return rank_bound(slices.permute(1, 2, 0, 3), ranks, None)

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
        """One SVD per slice without a metric (global optimum); exact block descent over the slices under one.

        Solvers: default; "projection" ignores the metric. Options: ``sweeps``, most rounds of
        descent (3), and ``tolerance``, the relative decrease of a round at which to stop (1e-3).
        """
        require_solver(self, solver, ("default", "projection"))
        out_block, hidden, in_block = self._sizes(*target.shape)
        b = self.blocks
        ranks = self.slice_ranks(*target.shape).to(target.device)
        padded = pad_matrix(target, b * out_block, b * in_block)
        slices = padded.view(out_block, b, b, in_block).permute(1, 2, 0, 3)  # (row group, column group, s, p)
        if metric is None or solver == "projection":
            left, right = project_slices(slices, ranks)
        else:
            left, right = fit_slices(
                slices, ranks, metric.padded(b * in_block), sweeps=sweeps, tolerance=tolerance, on_step=on_step
            )
        a, c, j = self._directions(hidden, target.device)
        return {
            "right": right[a, c, j].view(b, hidden, in_block),
            "left": left[a, c, :, j].view(hidden, b, out_block).permute(1, 2, 0),
        }
