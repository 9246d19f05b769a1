"""Numbers of few bits on even grids: round-to-nearest and GPTQ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, damped_moment, inverse_root, sweep_columns
from isogrid.fitting.grids import RoundToGrid, grids_of, nearest_codes
from isogrid.fitting.sweep import BLOCK
from isogrid.formats.checks import require_solver
from isogrid.formats.coded import Coded
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.traits import Traits
from isogrid.kernels import pack_codes, packed_bytes, unpack_codes

MOST_BITS = 8


@dataclass(frozen=True)
class Quantized(Coded):
    """``W[i, j] = scale[i, g] · (code[i, j] - zero[i, g])``: one grid for every ``group`` neighbours in a row.

    Codes and zeros take ``bits`` bits, packed; scales are the layer's floating numbers: bits + (16 + bits) / group bits
    an entry at 16-bit scales. Fewer bytes, not fewer operations: a product multiplies the matrix out first.

    Attributes:
        bits: of a code, 1 … 8.
        group: neighbours of a row that share a grid; None: the whole row.
    """

    bits: int = 4
    group: int | None = 128

    name: ClassVar[str] = "quantized"
    size_field: ClassVar[str] = "bits"
    traits: ClassVar[Traits] = Traits(linear_in_factors=True)

    def __post_init__(self) -> None:
        for what, value, most in (("bits", self.bits, MOST_BITS), ("group", self.group or 1, None)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole or (most is not None and value > most) or self.group == 0:
                limit = f"in 1 … {most}" if most is not None else "positive, or None for whole rows"
                raise IsogridError(f"quantized: {what} is an integer {limit}, got {getattr(self, what)!r}")

    def size_limit(self, out_features: int, in_features: int) -> int:
        """Most bits of a code."""
        return MOST_BITS

    def _group(self, in_features: int) -> int:
        return max(min(self.group or in_features, in_features), 1)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``scale (out, groups)``; ``zero (out, …)`` and ``codes (out, ceil(in · bits / 8))`` packed in uint8."""
        groups = -(-in_features // self._group(in_features))
        return {
            "scale": Factor((out_features, groups)),
            "zero": Factor((out_features, packed_bytes(groups, self.bits)), torch.uint8, "code"),
            "codes": Factor((out_features, packed_bytes(in_features, self.bits)), torch.uint8, "code"),
        }

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Codes less their zeros, times their scales."""
        scale, group = factors["scale"], self._group(in_features)
        groups = scale.shape[1]
        codes = unpack_codes(factors["codes"], self.bits, in_features).to(torch.int16)
        zero = unpack_codes(factors["zero"], self.bits, groups).to(torch.int16)
        codes = torch.nn.functional.pad(codes, (0, groups * group - in_features)).view(out_features, groups, group)
        steps = (codes - zero.unsqueeze(-1)).to(scale.dtype)
        return (steps * scale.unsqueeze(-1)).view(out_features, groups * group)[:, :in_features]

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """A dense product with the matrix multiplied out."""
        return torch.nn.functional.linear(x, self.dense(factors, out_features, x.shape[-1]))

    @torch.no_grad()
    def initialize(
        self,
        factors: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Random codes about the middle, and the scale that keeps variances."""
        levels, groups = 2**self.bits, factors["scale"].shape[1]
        codes = torch.randint(0, levels, (out_features, in_features), generator=generator)
        factors["codes"].copy_(pack_codes(codes, self.bits))
        middle = torch.full((out_features, groups), levels // 2)
        factors["zero"].copy_(pack_codes(middle, self.bits))
        # Mean square of code - levels // 2 for even chances: the variance, and a half squared.
        size = math.sqrt((levels**2 - 1) / 12 + 0.25)
        factors["scale"].fill_(math.sqrt(max(min(out_features, in_features), 1)) / max(in_features, 1) / size)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        symmetric: bool = False,
        search: bool = False,
        order: bool = True,
        fresh: bool = False,
        damping: float = 0.01,
        **options: Any,
    ) -> Factors:
        """To the nearest level; under a metric GPTQ (Frantar et al. 2022), whose columns make up for earlier ones.

        Solvers: default; "nearest" and "gptq" name the two, "projection" ignores the metric. Options: ``symmetric``
        (False) puts zero in the middle; ``search`` (False) tries narrower ranges; ``order`` (True) takes columns with
        the largest mean square first, with the grids of the original matrix; without it ``fresh`` (False) finds each
        group's grid when the sweep reaches it; ``damping`` (0.01) of the mean diagonal.
        """
        require_solver(self, solver, ("default", "nearest", "gptq", "projection"))
        if order and fresh:
            raise IsogridError("quantized: fresh grids need columns in their own order; pass order=False with them")
        n = target.shape[1]
        group = self._group(n)
        grid = grids_of(target, group, self.bits, symmetric=symmetric, search=search)
        if solver in ("nearest", "projection") or (solver == "default" and metric is None):
            codes = nearest_codes(target, grid, group)
            return self._written(codes, grid.scale, grid.zero)
        hessian, dead = damped_moment(metric, n, damping, target)
        columns = torch.arange(n, device=target.device)
        if order:
            columns = hessian.diagonal().argsort(descending=True, stable=True)
        root = inverse_root(hessian[columns][:, columns])
        rounding = RoundToGrid(grid, columns // group, (symmetric, search) if fresh else None)
        current = target.masked_fill(dead, 0)[:, columns]
        width = group * max(1, BLOCK // group) if fresh else BLOCK
        sweep_columns(current, root, rounding, block=width)
        codes = torch.empty_like(rounding.codes)
        codes[:, columns] = rounding.codes
        return self._written(codes, rounding.grid.scale, rounding.grid.zero)

    def _written(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Factors:
        return {"scale": scale, "zero": pack_codes(zero, self.bits), "codes": pack_codes(codes, self.bits)}
