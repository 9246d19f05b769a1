"""Matrices with zeros: a fraction of the entries anywhere, or some of every few neighbours in a row."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import BudgetError, IsogridError
from isogrid.fitting import PRUNERS, Kept, Metric, OnStep, kept_of, prune, pruned
from isogrid.formats.budget import Budget
from isogrid.formats.checks import require_solver
from isogrid.formats.coded import Coded
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.start import normal_
from isogrid.formats.traits import Traits
from isogrid.kernels import pack_mask, packed_bytes, scattered, sparse_product, unpack_mask


@dataclass(frozen=True)
class Masked(Coded):
    """What formats of values and a mask share: ``values (nonzeros,)`` in row-major order, one bit an entry for where.

    The mask is packed row by row, ``(out, ceil(in / 8))`` bytes. A product with one to four rows of input reads the
    values and the mask as they are stored, where native products are to be had; others scatter them into a dense matrix
    first, for every product: what is kept in memory is what is stored.
    """

    @abstractmethod
    def kept(self, out_features: int, in_features: int) -> Kept:
        """How many entries are kept and where they may lie."""

    @abstractmethod
    def nonzeros(self, out_features: int, in_features: int) -> int:
        """Number of entries kept."""

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``values (nonzeros,)`` and ``mask (out, ceil(in / 8))`` uint8, lowest bit first."""
        return {
            "values": Factor((self.nonzeros(out_features, in_features),)),
            "mask": Factor((out_features, packed_bytes(in_features)), torch.uint8, "code"),
        }

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The values scattered into zeros."""
        return scattered(factors["values"], factors["mask"], in_features)

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """From the stored bytes where rows are few, else a dense product with the scattered matrix."""
        return sparse_product(x, factors["values"], factors["mask"])

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Random places, values of the size that keeps variances."""
        count = factors["values"].numel()
        normal_(
            factors["values"],
            math.sqrt(min(out_features, in_features) / (in_features * max(count, 1) / out_features)),
            generator,
        )
        device = generator.device if generator is not None else "cpu"
        scores = torch.rand(out_features, in_features, generator=generator, device=device)
        factors["mask"].copy_(pack_mask(self.kept(out_features, in_features).choose(scores)))

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        damping: float = 0.01,
        sweeps: int = 30,
        tolerance: float = 1e-3,
        **options: Any,
    ) -> Factors:
        """The largest entries, which are optimal; under a metric, exact sweeps over the places and values of the rows.

        Solvers: default; "magnitude", "wanda", "sparsegpt", "nowag" as published (`isogrid.fitting.pruned`);
        "projection" ignores the metric. Options: ``damping`` (0.01, of SparseGPT's Hessian), ``sweeps`` (30, at most)
        and ``tolerance`` (1e-3, the relative decrease of a sweep at which to stop).
        """
        require_solver(self, solver, ("default", *PRUNERS, "projection"))
        if sweeps < 0:
            raise IsogridError(f"{self.name}: its fit takes 0 sweeps or more, got sweeps={sweeps}")
        m, n = target.shape
        kept = self.kept(m, n)
        if solver in PRUNERS:
            values, mask = pruned(target, metric, kept, solver, damping)
        else:
            begin = None
            if start is not None and metric is not None and solver == "default":
                begin = self.dense(start, m, n), unpack_mask(start["mask"], n)
            values, mask = prune(
                target,
                metric if solver == "default" else None,
                kept,
                start=begin,
                damping=damping,
                sweeps=sweeps,
                tolerance=tolerance,
                generator=generator,
                on_step=on_step,
            )
        return {"values": values[mask], "mask": pack_mask(mask)}


@dataclass(frozen=True)
class Sparse(Masked):
    """The entries that matter most, anywhere: density · out · in values, and one bit an entry for where they are.

    At a density of a half and 16-bit values 9 bits an entry. Fewer bytes, not fewer operations (see `Masked`).

    Attributes:
        density: fraction of the entries in (0, 1]; at least one entry is kept. None until `sized`.
    """

    density: float | None = None

    name: ClassVar[str] = "sparse"
    open_field: ClassVar[str] = "density"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, monotone_in_budget=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        plain = isinstance(self.density, int | float) and not isinstance(self.density, bool)
        if self.density is not None and not (plain and 0 < self.density <= 1):
            raise IsogridError(f"sparse: density is a fraction in (0, 1], got {self.density!r}")

    def nonzeros(self, out_features: int, in_features: int) -> int:
        """Number of entries kept."""
        if self.density is None:
            raise IsogridError("sparse has no density yet: give density=… or call .sized(out, in, budget)")
        return max(1, round(self.density * out_features * in_features))

    def kept(self, out_features: int, in_features: int) -> Kept:
        """So many entries anywhere."""
        return Kept(count=self.nonzeros(out_features, in_features))

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """As many entries as fit."""
        least = replace(self, density=1 / (out_features * in_features)).cost(out_features, in_features, budget.dtype)
        entry = 1 if budget.parameters is not None else budget.dtype.itemsize
        left = budget.limit - budget.amount(least)
        if left < 0:
            raise BudgetError(
                f"sparse: one entry of a {out_features} x {in_features} matrix, and where it is, takes "
                f"{budget.amount(least)}, the budget is {budget}"
            )
        count = min(1 + left // entry, out_features * in_features)
        member = replace(self, density=count / (out_features * in_features))
        assert member.nonzeros(out_features, in_features) == count
        return member


@dataclass(frozen=True)
class SemiStructured(Masked):
    """``keep`` of every ``of`` neighbours in a row: keep / of · out · in values, and one bit an entry for where.

    2:4, what some accelerators multiply by at twice the speed, takes 9/16 of the bytes of a dense matrix in 16-bit
    numbers. Fewer bytes, not fewer operations here (see `Masked`). A last group that is shorter keeps as large a part,
    rounded up.

    Attributes:
        keep: entries kept of a group; papers that count those pruned call it ``of - keep``.
        of: entries of a group.
    """

    keep: int = 2
    of: int = 4

    name: ClassVar[str] = "semi_structured"
    size_field: ClassVar[str] = "keep"
    traits: ClassVar[Traits] = Traits(exact_on_members=True, optimal=True, linear_in_factors=True)

    def __post_init__(self) -> None:
        require_pattern(self.name, self.keep, self.of)

    def size_limit(self, out_features: int, in_features: int) -> int:
        """All of a group; less where a whole row is shorter than a group."""
        return self.of * (min(in_features, self.of) - 1) // min(in_features, self.of) + 1 if in_features else 1

    def nonzeros(self, out_features: int, in_features: int) -> int:
        """Number of entries kept."""
        return out_features * kept_in_row(in_features, self.keep, self.of)

    def kept(self, out_features: int, in_features: int) -> Kept:
        """So many of every group."""
        return Kept(keep=self.keep, of=self.of)


def kept_in_row(n: int, keep: int, of: int) -> int:
    """Entries kept of a row of ``n``."""
    return n // of * keep + kept_of(n % of, keep, of)


def require_pattern(name: str, keep: int, of: int) -> None:
    """Raise IsogridError unless ``keep`` of every ``of`` entries can be kept."""
    for value in (keep, of):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise IsogridError(f"{name}: keep and of are positive integers, got keep={keep!r}, of={of!r}")
    if keep > of:
        raise IsogridError(f"{name}: keep={keep} of every of={of} entries are more than there are; take keep <= {of}")
