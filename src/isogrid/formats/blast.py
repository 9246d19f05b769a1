"""BLAST: blocks with shared row and column bases, coupled by one diagonal per block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, descend, low_rank, project_slices, rank_bound, shared_bases, squared_norm
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.formulations import Formulation, blast_einsum, blast_published
from isogrid.formats.sizes import pad_matrix
from isogrid.formats.start import Component, orthonormalize_
from isogrid.formats.traits import Traits
from isogrid.kernels import coupled_stages


@dataclass(frozen=True)
class Blast(Format):
    """Block (i, j) is ``left[i] · diag(coupling[i, j]) · right[j]``: rank · (out + in + blocks²) parameters.

    ``left (blocks, out_block, rank)``, ``right (blocks, rank, in_block)``, ``coupling (blocks, blocks, rank)``
    (Lee et al. 2024). Contains low rank (couplings of one), block-diagonal and block-low-rank matrices; on generic
    weights the best approximation per parameter of the trainable formats.

    Attributes:
        rank: shared by all blocks; None until `sized`.
        blocks: number of row blocks and of column blocks; sizes they don't divide are padded.
    """

    rank: int | None = None
    blocks: int = 4

    name: ClassVar[str] = "blast"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(linear_in_factors=True)

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise IsogridError(f"blast: blocks is a positive integer, got {self.blocks!r}")

    def _sizes(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(out_block, in_block)."""
        return -(-out_features // self.blocks), -(-in_features // self.blocks)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``right (b, rank, in_block)``, ``coupling (b, b, rank)``, ``left (b, out_block, rank)``, b blocks."""
        rank = require_rank(self, self.rank)
        out_block, in_block = self._sizes(out_features, in_features)
        return {
            "right": Factor((self.blocks, rank, in_block)),
            "coupling": Factor((self.blocks, self.blocks, rank)),
            "left": Factor((self.blocks, out_block, rank)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """Three batched products; the coupling mixes blocks separately for each direction."""
        right, coupling, left = factors["right"], factors["coupling"], factors["left"]
        return coupled_stages(x, right, coupling, left, features=out_features, bias=bias)

    def formulations(self) -> dict[str, Formulation]:
        """As its paper writes it, and as einsum."""
        return {"published": blast_published, "einsum": blast_einsum}

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``right``, ``coupling``, ``left``."""
        rank = require_rank(self, self.rank)
        out_block, in_block = self._sizes(out_features, in_features)
        hidden = self.blocks * rank
        return [
            Component("right", in_block, rank, hidden),
            Component("coupling", self.blocks, self.blocks, hidden),
            Component("left", rank, out_block, self.blocks * out_block),
        ]

    @torch.no_grad()
    def orthonormalize(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> None:
        """The blocks of ``right`` and ``left``; of ``coupling`` each direction's ``(blocks, blocks)`` matrix."""
        for stack in (factors["right"], factors["coupling"].permute(2, 0, 1), factors["left"]):
            orthonormalize_(stack)

    def size_limit(self, out_features: int, in_features: int) -> int:
        """Block-low-rank with blocks of full rank is a member there: every matrix is."""
        return self.blocks * min(self._sizes(out_features, in_features))

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Bases as every dense stage starts; couplings of one size and random sign.

        Couplings drawn uniformly, as published, give blocks of very different sizes.
        """
        super().initialize(factors, out_features, in_features, generator)
        signs = torch.where(factors["coupling"] < 0, -1.0, 1.0) / math.sqrt(self.blocks)
        factors["coupling"].copy_(signs)

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """Every row of blocks has rank ``rank`` at most (fitting theory 3.7)."""
        out_block, _ = self._sizes(*target.shape)
        rows = pad_matrix(target, self.blocks * out_block, target.shape[1]).view(self.blocks, out_block, -1)
        return rank_bound(rows, require_rank(self, self.rank), metric)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        sweeps: int | None = None,
        polish: int | None = None,
        restarts: int | None = None,
        **options: Any,
    ) -> Factors:
        """Preconditioned descent from several starts, the best continued, then quasi-Newton polish.

        Starts: the low-rank optimum cut into blocks, block-low-rank slices on a Latin square, random bases. Every
        iterate counts, so the result is never worse than low rank of the same rank.

        Solvers: default; "projection" ignores the metric. Options: ``sweeps`` of the descent, ``polish`` (most
        quasi-Newton steps) and ``restarts`` (random starts). By default small matrices, where every one of them is
        nearly free, get many; large ones 12 sweeps from the low-rank start.
        """
        require_solver(self, solver, ("default", "projection"))
        used = None if solver == "projection" else metric
        b = self.blocks
        out_block, in_block = self._sizes(*target.shape)
        scale = target.square().mean().sqrt()
        if scale == 0:
            scale = torch.ones_like(scale)
        padded = pad_matrix(target / scale, b * out_block, b * in_block)
        wide = None if used is None else used.padded(b * in_block)
        effort = _effort(padded.shape[0], padded.shape[1], weighted=wide is not None)
        sweeps = effort[0] if sweeps is None else sweeps
        polish = effort[1] if polish is None else polish
        restarts = effort[2] if restarts is None else restarts
        starts = [start] if start is not None else self._starts(padded, wide, generator, restarts)
        trials = [
            shared_bases(padded, wide, begin, sweeps=min(12, sweeps) if len(starts) > 1 else 0) for begin in starts
        ]
        trials.sort(key=lambda trial: trial[0])
        best = trials[0]
        for trial in trials[: max(1, restarts // 4)]:
            found = shared_bases(padded, wide, trial[1], sweeps=sweeps, on_step=on_step)
            if polish:
                found = min(found, self._polished(padded, wide, found[1], polish), key=lambda pair: pair[0])
            best = min(best, found, key=lambda pair: pair[0])
        return best[1] | {"left": best[1]["left"] * scale}

    def _polished(self, target: Tensor, metric: Metric | None, begin: Factors, steps: int) -> tuple[float, Factors]:
        """(objective, factors) after quasi-Newton steps on all factors together."""
        found = descend(
            lambda factors, x: self.multiply(factors, x, target.shape[0]),
            begin,
            {"right", "coupling", "left"},
            target,
            metric,
            steps=steps,
        )
        return squared_norm(target - self.dense(found, *target.shape), metric), found

    def _starts(
        self, target: Tensor, metric: Metric | None, generator: torch.Generator, restarts: int
    ) -> list[Factors]:
        """Factors on a padded target: low rank and, where restarts are asked for, the Latin square and random ones."""
        rank, b = require_rank(self, self.rank), self.blocks
        (m, n), device = target.shape, target.device
        kept = min(rank, m, n)
        left, right = low_rank(target, metric, kept)
        spare = rank - kept
        left = torch.nn.functional.pad(left, (0, spare))
        right = torch.nn.functional.pad(right, (0, 0, 0, spare))
        ones = torch.ones(b, b, rank, dtype=torch.float64, device=device)
        # Couplings that are exactly alike would stay so: a little noise lets the blocks part.
        noise = torch.randn(b, b, rank, dtype=torch.float64, generator=generator).to(device)
        starts = [
            {
                "left": left.view(b, m // b, rank),
                "right": right.view(rank, b, n // b).transpose(0, 1).contiguous(),
                "coupling": ones + 0.01 * noise,
            }
        ]
        if not restarts:
            return starts
        share = min(rank // b, m // b, n // b)
        if share >= 1:
            blocks = target.view(b, m // b, b, n // b).transpose(1, 2)
            pieces = project_slices(blocks, torch.full((b, b), share, device=device))
            factors = {
                "left": torch.zeros(b, m // b, rank, dtype=torch.float64, device=device),
                "right": torch.zeros(b, rank, n // b, dtype=torch.float64, device=device),
                "coupling": torch.zeros_like(ones),
            }
            for i in range(b):
                for j in range(b):
                    slot = slice(((i + j) % b) * share, ((i + j) % b + 1) * share)
                    factors["left"][i, :, slot] = pieces[0][i, j]
                    factors["right"][j, slot] = pieces[1][i, j]
                    factors["coupling"][i, j, slot] = 1
            starts.append(factors)
        size = (target.square().mean() / rank).clamp(min=1e-300) ** 0.25
        for _ in range(restarts):
            random = {
                "left": size * torch.randn(b, m // b, rank, dtype=torch.float64, generator=generator).to(device),
                "right": size * torch.randn(b, rank, n // b, dtype=torch.float64, generator=generator).to(device),
                "coupling": torch.randn(b, b, rank, dtype=torch.float64, generator=generator).to(device),
            }
            starts.append(random)
        return starts


def _effort(m: int, n: int, *, weighted: bool) -> tuple[int, int, int]:
    """(sweeps, polish, restarts) by default: what a few seconds buy at this size."""
    if m * n <= 2**12:
        return 150, 200, 12
    if m * n <= 2**17:
        return 150, 100, 2
    return (12 if weighted else 40), 0, 0
