"""Sums of Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, balance, cholesky, leading_left
from isogrid.formats.base import Format
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors
from isogrid.formats.sizes import nearest_pair
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits
from isogrid.kernels import native_takes, two_stage


@dataclass(frozen=True)
class Kronecker(Format):
    """``W = Σ_t outer[t] ⊗ inner[t]``: terms · (m1 n1 + m2 n2) parameters.

    ``outer (terms, m1, n1)``, ``inner (terms, m2, n2)``, m1 m2 outputs and n1 n2 inputs, the first index the slow
    one. Each number is used about √(out · in) times, so the product costs far more than the parameters say. The same
    matrices as a tensor train with two cores and bond ``terms``.

    Attributes:
        terms: number of products; None until `sized`.
        out_factors: (m1, m2); None: the divisor pair nearest the root, the larger first.
        in_factors: (n1, n2) likewise.
    """

    terms: int | None = None
    out_factors: tuple[int, int] | None = None
    in_factors: tuple[int, int] | None = None

    name: ClassVar[str] = "kronecker"
    size_field: ClassVar[str] = "terms"
    traits: ClassVar[Traits] = Traits(
        exact_on_members=True, optimal=True, monotone_in_budget=True, linear_in_factors=True
    )

    def __post_init__(self) -> None:
        for key in ("out_factors", "in_factors"):
            pair = getattr(self, key)
            if pair is None:
                continue
            if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
                raise IsogridError(f"kronecker: {key} is a pair of positive integers, got {pair!r}")
            object.__setattr__(self, key, tuple(pair))

    def sides(self, out_features: int, in_features: int) -> tuple[int, int, int, int]:
        """(m1, m2, n1, n2)."""
        pairs = []
        for key, features in (("out_factors", out_features), ("in_factors", in_features)):
            given: tuple[int, int] | None = getattr(self, key)
            if given is not None and math.prod(given) != features:
                raise IsogridError(f"kronecker: {key} {given} multiply to {math.prod(given)}, not to {features}")
            pairs.append(given or nearest_pair(features))
        return (*pairs[0], *pairs[1])

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The smaller of m1 n1 and m2 n2: there every matrix is a member."""
        m1, m2, n1, n2 = self.sides(out_features, in_features)
        return min(m1 * n1, m2 * n2)

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``inner (terms, m2, n2)``, ``outer (terms, m1, n1)``."""
        terms = require_rank(self, self.terms)
        m1, m2, n1, n2 = self.sides(out_features, in_features)
        return {"inner": Factor((terms, m2, n2)), "outer": Factor((terms, m1, n1))}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """`affine` without a bias."""
        return self.affine(factors, x, out_features, None)

    def affine(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        """The fast index by ``inner``, then the slow one by ``outer``, terms summed in the second product."""
        inner, outer = factors["inner"], factors["outer"]
        (terms, m2, n2), (_, m1, n1) = inner.shape, outer.shape
        if native_takes(x, inner, outer):  # blocks that are all the same: hidden unit (j1, t, i2) to block i2
            first = inner.reshape(1, terms * m2, n2)
            second = outer.permute(1, 2, 0).reshape(1, m1, n1 * terms)
            return two_stage(x, first, second, blocks=(n1, m2), interleave=True, features=out_features, bias=bias)
        rows = x.reshape(-1, n2)  # (rows n1, n2)
        hidden = rows @ inner.reshape(terms * m2, n2).mT  # (rows n1, terms m2)
        hidden = hidden.view(-1, n1, terms, m2).permute(0, 3, 2, 1).reshape(-1, terms * n1)  # (rows m2, terms n1)
        out = hidden @ outer.permute(0, 2, 1).reshape(terms * n1, m1)  # (rows m2, m1)
        out = out.view(-1, m2, m1).transpose(1, 2).reshape(*x.shape[:-1], out_features)
        return out if bias is None else out + bias.to(out.dtype)

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """``inner``, then ``outer``, which sums the terms."""
        terms = require_rank(self, self.terms)
        m1, m2, n1, n2 = self.sides(out_features, in_features)
        return [
            Component("inner", n2, terms * m2, terms * m2 * n1),
            Component("outer", terms * n1, m1, m1 * m2),
        ]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Any:
        """Parameters as counted; multiply-adds of the two products."""
        counted = super().cost(out_features, in_features, dtype)
        terms = require_rank(self, self.terms)
        m1, m2, n1, n2 = self.sides(out_features, in_features)
        adds = n1 * terms * m2 * n2 + m2 * terms * n1 * m1
        return type(counted)(counted.parameters, adds, counted.bits)

    def solve(
        self,
        target: Tensor,
        metric: Metric | None,
        *,
        solver: str,
        start: Factors | None,
        on_step: OnStep | None,
        rounds: int = 20,
        tolerance: float = 1e-4,
        **options: Any,
    ) -> Factors:
        """Rearrangement and truncated SVD (Van Loan and Pitsianis 1993), the global optimum without a metric.

        Under a metric, exact alternating least squares from there. Solvers: default; "projection" ignores the metric.
        Options: ``rounds`` (20) and ``tolerance`` (1e-4).
        """
        require_solver(self, solver, ("default", "projection"))
        terms = require_rank(self, self.terms)
        m1, m2, n1, n2 = self.sides(*target.shape)
        if start is not None:
            outer, inner = start["outer"], start["inner"]
        else:
            table = target.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
            kept = min(terms, *table.shape)
            u = leading_left(table, kept)
            left, right = balance(u, u.mT @ table)
            outer = torch.nn.functional.pad(left.mT, (0, 0, 0, terms - kept)).reshape(terms, m1, n1)
            inner = torch.nn.functional.pad(right, (0, 0, 0, terms - kept)).reshape(terms, m2, n2)
        if metric is None or solver == "projection":
            return {"inner": inner, "outer": outer}
        moment = metric.matrix
        outer, inner = _descend(target, moment, outer, inner, rounds, tolerance, on_step)
        return {"inner": inner, "outer": outer}


def _descend(
    target: Tensor,
    moment: Tensor,
    outer: Tensor,
    inner: Tensor,
    rounds: int,
    tolerance: float,
    on_step: OnStep | None,
) -> tuple[Tensor, Tensor]:
    """Each factor in turn the exact minimiser for the other (fitting theory 4.4)."""
    (terms, m1, n1), (_, m2, n2) = outer.shape, inner.shape
    m4 = moment.view(n1, n2, n1, n2)  # a d b e
    tm = (target @ moment).view(m1, m2, n1, n2)  # i c a d

    def value() -> float:
        whole = torch.einsum("tia,tcd->icad", outer, inner).reshape(m1 * m2, n1 * n2)
        error = target - whole
        return float(((error @ moment) * error).sum())

    objective = value()
    if on_step is not None:
        on_step(0, objective)
    for step in range(1, rounds + 1):
        before, kept = objective, (outer, inner)
        by_inner = torch.einsum("adbe,sce->adbsc", m4, inner)
        gram = torch.einsum("tcd,adbsc->tasb", inner, by_inner).reshape(terms * n1, terms * n1)
        wish = torch.einsum("icad,tcd->ita", tm, inner).reshape(m1, terms * n1)
        outer = _solve(gram, wish).view(m1, terms, n1).transpose(0, 1)
        by_outer = torch.einsum("sib,adbe->siade", outer, m4)
        gram = torch.einsum("tia,siade->tdse", outer, by_outer).reshape(terms * n2, terms * n2)
        wish = torch.einsum("icad,tia->ctd", tm, outer).reshape(m2, terms * n2)
        inner = _solve(gram, wish).view(m2, terms, n2).transpose(0, 1)
        objective = value()
        if objective > before:  # rounding at the bottom
            (outer, inner), objective = kept, before
        if on_step is not None:
            on_step(step, objective)
        if before - objective <= tolerance * before:
            break
    norms = outer.norm(dim=(1, 2)), inner.norm(dim=(1, 2))
    scale = torch.where((norms[0] > 0) & (norms[1] > 0), norms[1] / norms[0], torch.ones_like(norms[0])).sqrt()
    return outer * scale.view(-1, 1, 1), inner / scale.view(-1, 1, 1)


def _solve(gram: Tensor, wish: Tensor) -> Tensor:
    """``wish · gram⁻¹`` with just enough ridge for terms that coincide."""
    ridge = 1e-12 * gram.diagonal().mean().clamp(min=1e-300)
    root = cholesky(gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(wish.mT, root).mT
