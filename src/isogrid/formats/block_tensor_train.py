"""Block Tensor-Train with two cores: a grid of contiguous blocks, each with its own low-rank factorisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, fit_slices, project_slices, rank_bound
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.formulations import Formulation, train_einsum, train_published
from isogrid.formats.sizes import balanced_pair, greedy_pair, pad_matrix
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits
from isogrid.kernels import derived, pad_features, two_stage


@dataclass(frozen=True)
class BlockTensorTrain(Format):
    """``W[(i0, i1), (j1, j0)] = Σ_s left[i0, (j1, s), i1] · right[j1, j0, (i0, s)]`` (Qiu et al. 2024).

    The matrix is cut into n0 x m1 contiguous blocks of n1 x m0, each of rank ``rank``. With sides near the square
    root that is about 2 · rank · d^1.5 parameters for a d x d matrix: the format for very small budgets on wide layers.

    Attributes:
        rank: rank of every block.
        factorization: how a size is split: "balanced" (the divisor pair nearest the root, padding sizes that have
            only skewed pairs) or "greedy" (the published rule: prime factors dealt to the smaller side).
        out_factors: (n0, n1) instead of the rule; a product above the number of outputs means padding.
        in_factors: (m1, m0) instead of the rule.
    """

    rank: int = 1
    factorization: str = "balanced"
    out_factors: tuple[int, int] | None = None
    in_factors: tuple[int, int] | None = None

    name: ClassVar[str] = "block_tensor_train"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, monotone_in_budget=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int):
            raise IsogridError(f"block_tensor_train: rank is a positive integer, got {self.rank!r}")
        require_rank(self, self.rank)
        if self.factorization not in ("balanced", "greedy"):
            raise IsogridError(
                f"block_tensor_train: factorization is 'balanced' or 'greedy', got {self.factorization!r}"
            )
        for key in ("out_factors", "in_factors"):
            pair = getattr(self, key)
            if pair is None:
                continue
            if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
                raise IsogridError(f"block_tensor_train: {key} is a pair of positive integers, got {pair!r}")
            object.__setattr__(self, key, tuple(pair))

    def grid(self, out_features: int, in_features: int) -> tuple[int, int, int, int]:
        """(n0, n1, m1, m0): n0 x m1 blocks of n1 x m0."""
        n0, n1 = self._pair("out_factors", out_features)
        m1, m0 = self._pair("in_factors", in_features)
        return n0, n1, m1, m0

    def _pair(self, key: str, features: int) -> tuple[int, int]:
        given: tuple[int, int] | None = getattr(self, key)
        if given is not None:
            if math.prod(given) < features:
                raise IsogridError(f"block_tensor_train: {key} {given} hold {math.prod(given)} of {features} features")
            return given
        if self.factorization == "greedy":
            small, large = greedy_pair(features)
        else:
            small, large = balanced_pair(features)
        return (small, large) if key == "out_factors" else (large, small)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``right (m1, m0, n0 · rank)``, ``left (n0, m1 · rank, n1)``."""
        n0, n1, m1, m0 = self.grid(out_features, in_features)
        return {
            "right": Factor((m1, m0, n0 * self.rank)),
            "left": Factor((n0, m1 * self.rank, n1)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """Blocked product, permutation, blocked product, on the factors as they lie where those are trained."""
        first = derived(factors["right"], "turned", lambda right: right.mT)
        second = derived(factors["left"], "turned", lambda left: left.mT)
        return two_stage(x, first, second, interleave=False, features=out_features, bias=bias, in_runs=True)

    def formulations(self) -> dict[str, Formulation]:
        """As its paper writes it, and as einsum."""
        return {"published": train_published, "einsum": train_einsum}

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``right``, then ``left``."""
        n0, n1, m1, m0 = self.grid(out_features, in_features)
        return [
            Component("right", m0, n0 * self.rank, m1 * n0 * self.rank),
            Component("left", m1 * self.rank, n1, n0 * n1),
        ]

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The smaller side of a block: there every matrix is a member."""
        _, n1, _, m0 = self.grid(out_features, in_features)
        return min(n1, m0)

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """A row group has at most its blocks' ranks together; without a metric each block counts alone."""
        n0, n1, m1, m0 = self.grid(*target.shape)
        rows = pad_matrix(target, n0 * n1, target.shape[1]).view(n0, n1, -1)
        if metric is not None:
            return rank_bound(rows, m1 * self.rank, metric)
        return rank_bound(pad_features(rows, m1 * m0).view(n0, n1, m1, m0).transpose(1, 2), self.rank, None)

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
        """One SVD per block without a metric (global optimum); exact block descent over the blocks under one.

        Solvers: default; "projection" ignores the metric. Options: ``sweeps``, most rounds of
        descent (3), and ``tolerance``, the relative decrease of a round at which to stop (1e-3).
        """
        require_solver(self, solver, ("default", "projection"))
        n0, n1, m1, m0 = self.grid(*target.shape)
        padded = pad_matrix(target, n0 * n1, m1 * m0)
        blocks = padded.view(n0, n1, m1, m0).transpose(1, 2)  # (n0, m1, n1, m0)
        ranks = torch.full((n0, m1), self.rank, device=target.device)
        if metric is None or solver == "projection":
            left, right = project_slices(blocks, ranks)
        else:
            left, right = fit_slices(
                blocks, ranks, metric.padded(m1 * m0), sweeps=sweeps, tolerance=tolerance, on_step=on_step
            )
        return {
            "right": right.permute(1, 3, 0, 2).reshape(m1, m0, n0 * self.rank),
            "left": left.transpose(2, 3).reshape(n0, m1 * self.rank, n1),
        }
