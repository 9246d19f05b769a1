"""ARMOR: a semi-structured core between two block-diagonal matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Kept, Metric, OnStep, Pattern, normalized, prune, pruned
from isogrid.fitting.armor import monotone_loop, published_loop
from isogrid.fitting.wrapped_core import WrappedCore, fit_wrapped_core, plain_core, settled
from isogrid.formats.base import Format
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.checks import require_solver, too_small
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.sizes import pad_matrix
from isogrid.formats.sparse import SemiStructured, require_pattern
from isogrid.formats.start import Component, gaussian_start
from isogrid.formats.traits import Traits
from isogrid.kernels import one_stage, pack_mask, scattered, sparse_product, unpack_mask

# Sweeps over the core alone before the wrappers join in.
FIRST_SWEEPS = 2


@dataclass(frozen=True)
class Armor(Format):
    """``W = blockdiag(outer) · core · blockdiag(inner)``, the core with ``keep`` of every ``of`` neighbours in a row.

    The wrappers change the basis of each run of ``block`` outputs and inputs, so that the rigid pattern of the core
    costs less (ARMOR, Liu et al. 2025). Beside a semi-structured matrix that takes ``block · (out + in)`` numbers more,
    a few percent. Blocks are no larger than a side; the last one may reach beyond it, and what does is not used.

    Attributes:
        block: side of the wrappers' blocks. 1 is a semi-structured matrix with scaled rows and columns.
        keep: entries of a group of the core that are kept.
        of: entries of a group.
    """

    block: int = 32
    keep: int = 2
    of: int = 4

    name: ClassVar[str] = "armor"
    size_field: ClassVar[str] = "block"
    traits: ClassVar[Traits] = Traits(linear_in_factors=True)

    def __post_init__(self) -> None:
        require_pattern(self.name, self.keep, self.of)
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise IsogridError(f"armor: block is a positive integer, got {self.block!r}")
        if not self._pattern.tried_whole:
            raise IsogridError(
                f"armor: {self.keep} of every {self.of} has more supports than can all be tried; take a smaller group"
            )

    @property
    def core(self) -> SemiStructured:
        """The format of the core."""
        return SemiStructured(self.keep, self.of)

    @property
    def _pattern(self) -> Pattern:
        return Pattern(self.keep, self.of)

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The larger side: both wrappers are dense then."""
        return max(out_features, in_features, 1)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``inner (ceil(in / b), b, b)``, the core's ``values`` and ``mask``, ``outer (ceil(out / a), a, a)``."""
        a, b = max(min(self.block, out_features), 1), max(min(self.block, in_features), 1)
        return {
            "inner": Factor((-(-in_features // b), b, b)),
            **self.core.factors(out_features, in_features),
            "outer": Factor((-(-out_features // a), a, a)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """Blocks, the core, blocks."""
        hidden = one_stage(x, factors["inner"], features=x.shape[-1])
        hidden = sparse_product(hidden, factors["values"], factors["mask"])
        return one_stage(hidden, factors["outer"], features=out_features)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The product of the three."""
        core = scattered(factors["values"], factors["mask"], in_features)
        right = one_stage(core, factors["inner"].mT, features=in_features)
        return one_stage(right.mT, factors["outer"], features=out_features).mT

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """The wrappers; the core has no dense stage."""
        specs = self.factors(out_features, in_features)
        return [
            Component(name, specs[name].shape[-1], specs[name].shape[-1], specs[name].numel // specs[name].shape[-1])
            for name in ("inner", "outer")
        ]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """The wrappers' blocks, and the core's cost: its zeros save bytes, not operations."""
        wrappers = sum(self.factors(out_features, in_features)[name].numel for name in ("inner", "outer"))
        return self.core.cost(out_features, in_features, dtype) + Cost(
            wrappers, wrappers, wrappers * dtype.itemsize * 8
        )

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """The core as it starts alone between Gaussian blocks."""
        self.core.initialize(factors, out_features, in_features, generator)
        stages = self.components(out_features, in_features)
        specs = self.factors(out_features, in_features)
        gaussian_start(factors, {stage.factor: specs[stage.factor] for stage in stages}, stages, generator)
        for name, size in (("inner", in_features), ("outer", out_features)):
            blocks, side, _ = factors[name].shape
            factors[name][-1].mul_(math.sqrt(side / (size - (blocks - 1) * side)))  # it has fewer inputs than a side

    def sized(self, out_features: int, in_features: int, budget: Budget) -> Self:
        """The largest block: one that divides the sides badly takes more than a larger one, so all are asked."""
        for block in range(self.size_limit(out_features, in_features), 0, -1):
            member = self.with_size(block)
            if budget.allows(member.cost(out_features, in_features, budget.dtype)):
                return member
        raise too_small(
            self, out_features, in_features, budget, self.with_size(1).cost(out_features, in_features, budget.dtype)
        )

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        generator: torch.Generator,
        on_step: OnStep | None,
        rounds: int = 30,
        tolerance: float = 1e-3,
        iterations: int | None = None,
        damping: float = 0.01,
        **options: Any,
    ) -> Factors:
        """Exact block descent on the outputs' error, from a core that sweeps have fitted alone.

        Solvers: default; "proxy": the same descent on the published objective, in which rows and columns are normalised
        and inputs uncorrelated; "published": the published loop on it; "monotone": the variant of the paper's theorem.
        The last three start from NoWag-P, and want ``in`` a multiple of ``of`` and the block one too. Options:
        ``rounds`` (30, at most) and ``tolerance`` (1e-3, relative decrease of a round at which to stop) of the descent,
        ``iterations`` of the loops (20 000 and 300), ``damping`` (0.01) of the start's Hessian.
        """
        require_solver(self, solver, ("default", "proxy", "published", "monotone"))
        if rounds < 0 or (iterations is not None and iterations < 0):
            raise IsogridError(f"armor: its fit takes 0 rounds or more, got rounds={rounds}, iterations={iterations}")
        m, n = target.shape
        begin = None if start is None else self._read(start, m, n)
        if solver != "default":
            found = self._fit_proxy(target, metric, begin, solver, rounds, tolerance, iterations, generator, on_step)
            return self._written(settled(found))
        kept = Kept(keep=self.keep, of=self.of)
        if begin is None:
            values, mask = prune(
                target,
                metric,
                kept,
                start=None,
                damping=damping,
                sweeps=FIRST_SWEEPS,
                tolerance=tolerance,
                generator=generator,
                on_step=None,
            )
            begin = plain_core(values, mask, self.block)
        moment = torch.eye(n, dtype=target.dtype, device=target.device) if metric is None else metric.matrix
        found = fit_wrapped_core(
            target, moment, begin, self._pattern, rounds=rounds, tolerance=tolerance, on_step=on_step
        )
        return self._written(settled(found))

    def _fit_proxy(
        self,
        target: Tensor,
        metric: Metric | None,
        begin: WrappedCore | None,
        solver: str,
        rounds: int,
        tolerance: float,
        iterations: int | None,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> WrappedCore:
        """On ``Σ h_q (W̄ - A S B)_pq²``, the norms of rows and columns folded into the wrappers at the end."""
        m, n = target.shape
        b = max(min(self.block, n), 1)
        loops = solver != "proxy"
        if loops and (n % self.of or b % self.of):
            raise IsogridError(
                f"armor: solver {solver!r} solves groups within blocks, so in_features={n} and the block's side {b} "
                f"have to be multiples of of={self.of}; the default solver takes any sizes"
            )
        power = torch.ones(n, dtype=target.dtype, device=target.device) if metric is None else metric.moment.diagonal()
        normed, rows, columns = normalized(target)
        if begin is None:
            _, mask = pruned(target, metric, Kept(keep=self.keep, of=self.of), "nowag", 0.0)
            core = plain_core(normed * mask, mask, self.block)
        else:
            core = _scaled(begin, 1 / rows, 1 / columns)
        if not loops:
            moment = torch.diag(power)
            found = fit_wrapped_core(
                normed, moment, core, self._pattern, rounds=rounds, tolerance=tolerance, on_step=on_step
            )
            return _scaled(found, rows, columns)
        width = len(core.inner) * b
        padded = WrappedCore(core.outer, pad_matrix(core.values, m, width), pad_matrix(core.mask, m, width), core.inner)
        wide, weights = pad_matrix(normed, m, width), torch.nn.functional.pad(power, (0, width - n))
        if solver == "published":
            steps = 20_000 if iterations is None else iterations
            found = published_loop(
                wide, weights, padded, self._pattern, iterations=steps, generator=generator, on_step=on_step
            )
        else:
            steps = 300 if iterations is None else iterations
            found = monotone_loop(wide, weights, padded, self._pattern, iterations=steps, on_step=on_step)
        cut = WrappedCore(found.outer, found.values[:, :n], found.mask[:, :n], found.inner)
        return _scaled(cut, rows, columns)

    @staticmethod
    def _read(factors: Factors, m: int, n: int) -> WrappedCore:
        values = scattered(factors["values"], factors["mask"], n)
        return WrappedCore(factors["outer"], values, unpack_mask(factors["mask"], n), factors["inner"])

    @staticmethod
    def _written(core: WrappedCore) -> Factors:
        return {
            "inner": core.inner,
            "values": core.values[core.mask],
            "mask": pack_mask(core.mask),
            "outer": core.outer,
        }


def _scaled(core: WrappedCore, rows: Tensor, columns: Tensor) -> WrappedCore:
    """``diag(rows) · V · diag(columns)``, the scales in the wrappers."""
    k, a, _ = core.outer.shape
    last, b, _ = core.inner.shape
    rows = torch.nn.functional.pad(rows, (0, k * a - len(rows))).view(k, a, 1)
    columns = torch.nn.functional.pad(columns, (0, last * b - len(columns))).view(last, 1, b)
    return WrappedCore(core.outer * rows, core.values, core.mask, core.inner * columns)
