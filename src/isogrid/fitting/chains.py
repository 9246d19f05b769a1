"""Block tensor trains of any length: their cores, their product and the projection by successive block SVDs.

With input digits (n_1 … n_c) and output digits (m_1 … m_c), core i is
``(rank_i, rank_{i-1}, m_1 ⋯ m_{i-1}, m_i, n_i, n_{i+1} ⋯ n_c)``: it exchanges digit i and sees all others (Qiu et al.
2024, the general form of their section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isogrid.fitting.low_rank import leading_left
from isogrid.fitting.report import rank_bound


def chain_bonds(outs: Sequence[int], ins: Sequence[int], rank: int) -> list[int]:
    """(1, rank_1, …, 1): the rank, cut to what both sides of each cut can use."""
    c = len(outs)
    bonds = [1] * (c + 1)
    for i in range(c - 1, 0, -1):
        bonds[i] = min(rank, bonds[i + 1] * outs[i], math.prod(ins[:i]))
    return bonds


def chain_shapes(outs: Sequence[int], ins: Sequence[int], rank: int) -> list[tuple[int, ...]]:
    """Shapes of the cores."""
    bonds = chain_bonds(outs, ins, rank)
    return [
        (bonds[i + 1], bonds[i], math.prod(outs[:i]), outs[i], ins[i], math.prod(ins[i + 1 :]))
        for i in range(len(outs))
    ]


def chain_multiply(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """``(rows, n_1 ⋯ n_c) -> (rows, m_1 ⋯ m_c)``."""
    rows = x.shape[0]
    state = x.mT  # (bond · done outputs · inputs to come, rows): feature-major, rows stay contiguous
    for core in cores:
        after, bond, done, own_out, own_in, rest = core.shape
        columns = state.reshape(bond, done, own_in, rest, rows).permute(1, 3, 0, 2, 4)
        blocks = core.permute(2, 5, 0, 3, 1, 4).reshape(done * rest, after * own_out, bond * own_in)
        moved = torch.bmm(blocks, columns.reshape(done * rest, bond * own_in, rows))
        state = moved.view(done, rest, after, own_out, rows).permute(2, 0, 3, 1, 4)
    return state.reshape(math.prod(core.shape[3] for core in cores), rows).mT


def chain_project(target: Tensor, outs: Sequence[int], ins: Sequence[int], rank: int) -> list[Tensor]:
    """Cores near a matrix ``(m_1 ⋯ m_c, n_1 ⋯ n_c)``: one batched SVD per cut, from the last core to the first.

    Optimal for two cores; for more, each cut is optimal given the later ones.
    """
    c = len(outs)
    bonds = chain_bonds(outs, ins, rank)
    cores: list[Tensor] = []
    # (bond after, outputs before, own output, inputs before, own input, inputs after)
    rest = target.reshape(1, math.prod(outs[:-1]), outs[-1], math.prod(ins[:-1]), ins[-1], 1)
    for i in range(c - 1, 0, -1):
        after, before_out, own_out, before_in, own_in, after_in = rest.shape
        table = rest.permute(1, 4, 5, 0, 2, 3).reshape(before_out, own_in, after_in, after * own_out, before_in)
        u = leading_left(table, bonds[i])  # (before_out, own_in, after_in, after own_out, bond)
        core = u.reshape(before_out, own_in, after_in, after, own_out, bonds[i])
        cores.append(core.permute(3, 5, 0, 4, 1, 2))
        inner = u.mT @ table  # (before_out, own_in, after_in, bond, before_in)
        inner = inner.permute(3, 0, 4, 1, 2)  # (bond, before_out, before_in, own_in, after_in)
        rest = inner.reshape(
            bonds[i], math.prod(outs[: i - 1]), outs[i - 1], math.prod(ins[: i - 1]), ins[i - 1], own_in * after_in
        )
    after, _, own_out, _, own_in, after_in = rest.shape
    cores.append(rest.reshape(after, 1, 1, own_out, own_in, after_in))
    return cores[::-1]


def chain_bound(target: Tensor, outs: Sequence[int], ins: Sequence[int], rank: int) -> float:
    """Least squared error of any chain: at each cut, outputs done and inputs to come choose a matrix of bond's rank."""
    bonds = chain_bonds(outs, ins, rank)
    best = 0.0
    for i in range(1, len(outs)):
        done, rest = math.prod(outs[:i]), math.prod(ins[i:])
        cut = target.reshape(done, math.prod(outs[i:]), math.prod(ins[:i]), rest).permute(0, 3, 1, 2)
        best = max(best, rank_bound(cut, bonds[i], None))
    return best
