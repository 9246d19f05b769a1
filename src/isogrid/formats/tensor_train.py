"""Tensor trains: a matrix as a chain of small cores, each seeing one digit of the row and one of the column index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import Metric, OnStep, alternating_least_squares, leading_left, rank_bound
from isogrid.formats.base import Format
from isogrid.formats.budget import Cost
from isogrid.formats.checks import require_rank, require_solver
from isogrid.formats.factors import Factor, Factors, balanced_norms
from isogrid.formats.sizes import nearest_sides
from isogrid.formats.start import Component
from isogrid.formats.traits import Traits

# Bytes of the widest intermediate that are multiplied at once: it then stays in a processor's cache.
IN_CACHE = 2**19
# Time of a multiply-add of the chain, small products between permutations, against one of a large product.
CHAIN_FACTOR = 2
# With fewer rows than this the matrix is never formed.
MANY_ROWS = 64


@dataclass(frozen=True)
class TensorTrain(Format):
    """``W[(i1 … ic), (j1 … jc)] = core0[:, i1, j1, :] · … · core{c-1}[:, ic, jc, :]``, bonds of size ``rank``.

    Core k is ``(rank_k, m_k, n_k, rank_{k+1})`` with outer ranks one; the first index is the slow one. Very few
    parameters, each used many times: the product costs far more than they say. Two cores are a sum of
    ``rank`` Kronecker products.

    Attributes:
        rank: largest bond; None until `sized`. A bond is never larger than the two sides of its cut allow.
        cores: number of cores; sizes are split into as many near-equal divisors.
    """

    rank: int | None = None
    cores: int = 2

    name: ClassVar[str] = "tensor_train"
    size_field: ClassVar[str] = "rank"
    traits: ClassVar[Traits] = Traits(exact_on_members=True, linear_in_factors=True)

    def __post_init__(self) -> None:
        if not isinstance(self.cores, int) or self.cores < 2:
            raise IsogridError(f"tensor_train: cores is an integer of at least 2, got {self.cores!r}")

    def sides(self, out_features: int, in_features: int) -> tuple[list[int], list[int]]:
        """(m_1 … m_c), (n_1 … n_c)."""
        return nearest_sides(out_features, self.cores), nearest_sides(in_features, self.cores)

    def bonds(self, out_features: int, in_features: int) -> list[int]:
        """(1, rank_1, …, rank_{c-1}, 1)."""
        rank = require_rank(self, self.rank)
        m, n = self.sides(out_features, in_features)
        sizes = [a * b for a, b in zip(m, n, strict=True)]
        cuts = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, self.cores)]
        return [1, *(min(rank, cut) for cut in cuts), 1]

    def size_limit(self, out_features: int, in_features: int) -> int:
        """The largest bond that any cut can use: there every matrix is a member."""
        whole = replace(self, rank=out_features * in_features * 4)
        return max(whole.bonds(out_features, in_features))

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``core0 (1, m_1, n_1, rank_1)``, …"""
        m, n = self.sides(out_features, in_features)
        bonds = self.bonds(out_features, in_features)
        return {f"core{k}": Factor((bonds[k], m[k], n[k], bonds[k + 1])) for k in range(self.cores)}

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """One digit after the other, the bond travels along; or by the matrix itself, where that takes less."""
        cores = [factors[f"core{k}"] for k in range(self.cores)]
        in_features = math.prod(core.shape[2] for core in cores)
        rows = x.reshape(-1, in_features)
        if torch.compiler.is_compiling():
            return self._chain(cores, rows).view(*x.shape[:-1], out_features)
        # From the cores themselves: finding how sizes are split takes longer than to multiply a row.
        chain, widest, whole = 0, 0, out_features * in_features
        done, rest = 1, in_features
        for core in cores:
            bond, m_k, n_k, after = core.shape
            done, rest = done * m_k, rest // n_k
            chain += bond * n_k * done * after * rest
            widest = max(widest, done * after * rest)
        if len(rows) >= MANY_ROWS and len(rows) * (CHAIN_FACTOR * chain - whole) > _multiply_out_adds(cores):
            return (rows @ self.dense(factors, out_features, in_features).mT).view(*x.shape[:-1], out_features)
        at_once = max(IN_CACHE // (x.itemsize * widest), 1)
        parts = [self._chain(cores, part) for part in rows.split(at_once)]
        return torch.cat(parts).view(*x.shape[:-1], out_features)

    def dense(self, factors: Mapping[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The cores multiplied out, one after the other."""
        joined = factors["core0"].squeeze(0)  # (rows so far, columns so far, bond)
        for k in range(1, self.cores):
            product = torch.tensordot(joined, factors[f"core{k}"], dims=1)  # (rows, columns, m_k, n_k, bond)
            joined = product.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return joined.squeeze(-1)

    @staticmethod
    def _chain(cores: list[Tensor], x: Tensor) -> Tensor:
        """``(rows, in) -> (rows, out)``."""
        n = [core.shape[2] for core in cores]
        rows = x.shape[0]
        state = x.reshape(rows, 1, 1, *n[:1], math.prod(n[1:]))  # (rows, done outputs, bond, digit, rest)
        for k, core in enumerate(cores):
            bond, m_k, n_k, after = core.shape
            done, rest = state.shape[1], state.shape[4]
            columns = state.permute(0, 1, 4, 2, 3).reshape(rows * done * rest, bond * n_k)
            moved = columns @ core.permute(0, 2, 1, 3).reshape(bond * n_k, m_k * after)
            moved = moved.view(rows, done, rest, m_k, after).permute(0, 1, 3, 4, 2)  # (rows, done, m_k, after, rest)
            following = n[k + 1] if k + 1 < len(cores) else 1
            state = moved.reshape(rows, done * m_k, after, following, rest // following)
        return state.reshape(rows, state.shape[1])

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """Each core, with the bonds in its fans."""
        m, n = self.sides(out_features, in_features)
        bonds = self.bonds(out_features, in_features)
        return [
            Component(
                f"core{k}",
                n[k] * bonds[k],
                m[k] * bonds[k + 1],
                math.prod(m[: k + 1]) * bonds[k + 1] * math.prod(n[k + 1 :]),
            )
            for k in range(self.cores)
        ]

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """Parameters as counted; multiply-adds of the chain."""
        counted = super().cost(out_features, in_features, dtype)
        adds = sum(stage.fan_in * stage.outputs for stage in self.components(out_features, in_features))
        return Cost(counted.parameters, adds, counted.bits)

    def lower_bound(self, target: Tensor, metric: Metric | None) -> float | None:
        """Without a metric, the largest bound of all cuts: each unfolding has the rank of its bond."""
        if metric is not None:
            return None
        m, n = self.sides(*target.shape)
        bonds = self.bonds(*target.shape)
        cuts = []
        for k in range(1, self.cores):
            head, rest = math.prod(m[:k]), math.prod(n[:k])
            unfolded = target.reshape(head, -1, rest, target.shape[1] // rest).transpose(1, 2)
            cuts.append(rank_bound(unfolded.reshape(head * rest, -1), bonds[k], None))
        return max(cuts)

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
        **options: Any,
    ) -> Factors:
        """Successive truncated SVDs (Oseledets 2011), optimal for two cores without a metric; then alternation.

        Solvers: default; "projection": the SVDs alone. Options: ``rounds`` (10) and ``inner`` (10 conjugate-gradient
        steps) of the alternating least squares.
        """
        require_solver(self, solver, ("default", "projection"))
        m, n = self.sides(*target.shape)
        found = self._project(target, m, n, self.bonds(*target.shape)) if start is None else start
        if solver == "projection" or (metric is None and self.cores == 2):
            return found
        return alternating_least_squares(
            lambda factors, x: self.multiply(factors, x, target.shape[0]),
            found,
            list(found),
            target,
            metric,
            rounds=rounds,
            inner=inner,
            on_step=on_step,
        )

    def _project(self, target: Tensor, m: list[int], n: list[int], bonds: list[int]) -> Factors:
        c = self.cores
        digits = [axis for k in range(c) for axis in (k, c + k)]
        rest = target.reshape(*m, *n).permute(digits).reshape(1, -1)
        found: Factors = {}
        for k in range(c - 1):
            table = rest.reshape(bonds[k] * m[k] * n[k], -1)
            u = leading_left(table, bonds[k + 1])
            found[f"core{k}"] = u.view(bonds[k], m[k], n[k], bonds[k + 1])
            rest = u.mT @ table
        found[f"core{c - 1}"] = rest.reshape(bonds[c - 1], m[c - 1], n[c - 1], 1)
        return balanced_norms(found)


def _multiply_out_adds(cores: list[Tensor]) -> int:
    """Multiply-adds of `TensorTrain.dense`."""
    done, adds = cores[0].shape[1] * cores[0].shape[2], 0
    for core in cores[1:]:
        adds += done * core.numel()
        done *= core.shape[1] * core.shape[2]
    return adds
