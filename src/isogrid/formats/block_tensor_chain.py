"""Block tensor trains of three and more cores: each exchanges one digit of the index and sees all the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import (
    Metric,
    OnStep,
    alternating_least_squares,
    chain_bonds,
    chain_bound,
    chain_multiply,
    chain_project,
    chain_shapes,
)
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors, balanced_norms
from isogrid.formats.sizes import nearest_sides
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits


@dataclass(frozen=True)
class BlockTensorChain(Format):
    """Block Tensor-Train with ``cores`` cores: ``core0 …``, one digit of the input for one of the output each.

    With two cores the same matrices as `BlockTensorTrain` in another order of the digits; more cores need fewer
    parameters at very large sizes, and have no optimal projection (Qiu et al. 2024, the general form).

    Attributes:
        rank: of the bonds between cores; a bond is never larger than its cut can use.
        cores: number of cores; sizes are split into as many near-equal divisors.
    """

    rank: int = 1
    cores: int = 3

    name: ClassVar[str] = "block_tensor_chain"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(exact_on_members=True, linear_in_factors=True)

    def __post_init__(self) -> None:
        require_rank(self, self.rank)
        if not isinstance(self.cores, int) or self.cores < 2:
            raise IsogridError(f"block_tensor_chain: cores is an integer of at least 2, got {self.cores!r}")

    def digits(self, out_features: int, in_features: int) -> tuple[list[int], list[int]]:
        """Digits of the output and of the input index, the slowest first."""
        return nearest_sides(out_features, self.cores), nearest_sides(in_features, self.cores)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``core{i} (bond after, bond before, outputs done, own output, own input, inputs to come)``."""
        shapes = chain_shapes(*self.digits(out_features, in_features), self.rank)
        return {f"core{i}": Factor(shape) for i, shape in enumerate(shapes)}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """One blocked product per core."""
        cores = [factors[f"core{i}"] for i in range(self.cores)]
        return chain_multiply(cores, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], out_features)

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """The cores in order."""
        shapes = chain_shapes(*self.digits(out_features, in_features), self.rank)
        return [
            Component(f"core{i}", own_in * before, own_out * after, after * done * own_out * rest)
            for i, (after, before, done, own_out, own_in, rest) in enumerate(shapes)
        ]

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The largest bond that any cut can use."""
        return max(chain_bonds(*self.digits(out_features, in_features), out_features * in_features))

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """Without a metric, the largest bound of all cuts (`chain_bound`)."""
        return None if metric is not None else chain_bound(target, *self.digits(*target.shape), self.rank)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        on_step: OnStep | None,
        rounds: int = 10,
        inner: int = 10,
        tolerance: float = 1e-3,
        **options: Any,
    ) -> Factors:
        """Successive block SVDs, then alternating least squares.

        Solvers: default; "projection": the SVDs alone. Options: ``rounds`` (10), ``inner`` (10 conjugate-gradient steps
        on one core) and ``tolerance`` (1e-3, relative decrease of a round at which to stop).
        """
        require_solver(self, solver, ("default", "projection"))
        found = start
        if found is None:
            cores = chain_project(target, *self.digits(*target.shape), self.rank)
            found = balanced_norms({f"core{i}": core for i, core in enumerate(cores)})
        if solver == "projection":
            return found
        return alternating_least_squares(
            lambda factors, x: self.multiply(factors, x, target.shape[0]),
            found,
            list(found),
            target,
            metric,
            rounds=rounds,
            inner=inner,
            tolerance=tolerance,
            on_step=on_step,
        )
