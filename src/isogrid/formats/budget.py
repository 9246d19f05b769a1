"""What a matrix costs, and how much it may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from isogrid.errors import IsogridError


@dataclass(frozen=True)
class Cost:
    """What a matrix in a format costs. Costs add.

    Attributes:
        parameters: trained numbers.
        multiply_adds: per row of input.
        bits: everything stored, codes, indices and scales included.
    """

    parameters: int
    multiply_adds: int
    bits: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters, self.multiply_adds + other.multiply_adds, self.bits + other.bits
        )

    @property
    def bytes(self) -> int:
        """Stored bytes, rounded up."""
        return -(-self.bits // 8)


@dataclass(frozen=True)
class Budget:
    """How much one matrix may cost: parameters or bytes, exactly one of them.

    Attributes:
        parameters: most trained numbers.
        bytes: most stored bytes, for factors of ``dtype``.
        dtype: floating dtype the bytes are counted for.
    """

    parameters: int | None = None
    bytes: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        given = [limit for limit in (self.parameters, self.bytes) if limit is not None]
        if len(given) != 1:
            raise IsogridError("a budget is in parameters or in bytes: give exactly one of them")
        if given[0] < 0:
            raise IsogridError(f"a budget is not negative, got {given[0]}")

    @classmethod
    def keep(cls, fraction: float, out_features: int, in_features: int) -> Budget:
        """The budget of a fraction in (0, 1] of the dense matrix's parameters, rounded down."""
        if not 0 < fraction <= 1:
            raise IsogridError(f"keep is a fraction of the dense parameters in (0, 1], got {fraction}")
        # 0.1 · 70 is 7.000000000000001 in binary: a hair of slack keeps exact fractions exact, both ways.
        return cls(parameters=math.floor(fraction * out_features * in_features * (1 + 1e-12)))

    def allows(self, cost: Cost) -> bool:
        """Whether a cost stays within the budget."""
        return self.amount(cost) <= self.limit

    def amount(self, cost: Cost) -> int:
        """The part of a cost that this budget counts."""
        return cost.parameters if self.parameters is not None else cost.bytes

    @property
    def limit(self) -> int:
        """Most parameters or bytes, whichever the budget is in."""
        limit = self.parameters if self.parameters is not None else self.bytes
        assert limit is not None
        return limit

    def with_limit(self, limit: int) -> Budget:
        """A budget in the same unit and dtype; a limit below zero counts as zero."""
        unit = "parameters" if self.parameters is not None else "bytes"
        return Budget(**{unit: max(limit, 0)}, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.parameters} parameters" if self.parameters is not None else f"{self.bytes} bytes"
