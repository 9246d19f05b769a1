"""Products as papers and users write them, for benchmarks to time beside this library's and for tests to compare with.

``published``: chains of batched products with the rows on the left, an intermediate and its permutation in memory.
``einsum``: one line of ``torch.einsum`` a stage, or one for all where the stages share their axes.
"""

# einsum letters: b rows, c and j column blocks, p inputs of a block, q hidden units of a block, i row blocks, s outputs
# of a block, r ranks, n inputs, m outputs

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from isogrid.kernels import pad_features

Factors = Mapping[str, Tensor]
Formulation = Callable[[Factors, Tensor, int], Tensor]


def low_rank_published(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """Two dense layers, as every low-rank paper has them."""
    return torch.nn.functional.linear(torch.nn.functional.linear(x, factors["right"]), factors["left"])


def low_rank_einsum(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """One einsum of three operands."""
    return torch.einsum("...n,rn,mr->...m", x, factors["right"], factors["left"])


def block_diagonal_published(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """Dao et al. 2022 (``blockdiag_multiply``): one batched product, blocks first."""
    diagonal = factors["diagonal"]
    out = torch.bmm(_blocks(x, diagonal).transpose(0, 1), diagonal.mT).transpose(0, 1)
    return _features(out, x, out_features)


def block_diagonal_einsum(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """One einsum."""
    diagonal = factors["diagonal"]
    return _features(torch.einsum("bcp,cqp->bcq", _blocks(x, diagonal), diagonal), x, out_features)


def monarch_published(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """Dao et al. 2022 (``blockdiag_butterfly_multiply``): two batched products, the permutation copied between them."""
    right, left = factors["right"], factors["left"]
    k, q, _ = right.shape
    blocks = _blocks(x, right)
    hidden = torch.bmm(blocks.transpose(0, 1), right.mT).transpose(0, 1).reshape(len(blocks), q, k)
    out = torch.bmm(hidden.permute(2, 0, 1).contiguous(), left.mT)  # (row groups, rows, s)
    return _features(out.permute(1, 2, 0), x, out_features)


def monarch_einsum(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """An einsum a stage."""
    right, left = factors["right"], factors["left"]
    k, q, _ = right.shape
    hidden = torch.einsum("bcp,cqp->bcq", _blocks(x, right), right).reshape(x.shape[:-1].numel(), q, k)
    return _features(torch.einsum("bri,isr->bsi", hidden, left), x, out_features)


def train_published(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """Qiu et al. 2024: two batched products over contiguous blocks, rows on the left."""
    right, left = factors["right"], factors["left"]
    (m1, _, _), (n0, _, _) = right.shape, left.shape
    blocks = _blocks(x, right.mT)
    rows = len(blocks)
    hidden = torch.bmm(blocks.transpose(0, 1), right).view(m1, rows, n0, right.shape[2] // n0)
    out = torch.bmm(hidden.permute(2, 1, 0, 3).reshape(n0, rows, left.shape[1]), left)
    return _features(out.transpose(0, 1), x, out_features)


def train_einsum(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """One einsum of three operands."""
    right, left = factors["right"], factors["left"]
    (m1, p, _), (n0, _, s) = right.shape, left.shape
    blocks = _blocks(x, right.mT)
    out = torch.einsum("bcp,cpir,icrs->bis", blocks, right.view(m1, p, n0, -1), left.view(n0, m1, -1, s))
    return _features(out, x, out_features)


def blast_published(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """Lee et al. 2024: two batched products, the coupling a broadcast product and a sum between them."""
    right, coupling, left = factors["right"], factors["coupling"], factors["left"]
    hidden = torch.bmm(_blocks(x, right).transpose(0, 1), right.mT)  # (columns, rows, rank)
    mixed = (coupling.unsqueeze(2) * hidden.unsqueeze(0)).sum(1)  # (row blocks, rows, rank)
    return _features(torch.bmm(mixed, left.mT).transpose(0, 1), x, out_features)


def blast_einsum(factors: Factors, x: Tensor, out_features: int) -> Tensor:
    """An einsum a stage."""
    right, coupling, left = factors["right"], factors["coupling"], factors["left"]
    hidden = torch.einsum("bjp,jrp->bjr", _blocks(x, right), right)
    mixed = torch.einsum("bjr,ijr->bir", hidden, coupling)
    return _features(torch.einsum("bir,isr->bis", mixed, left), x, out_features)


def _blocks(x: Tensor, stage: Tensor) -> Tensor:
    """The rows of x, cut for the blocks ``(k, q, p)`` of a first stage: ``(rows, k, p)``."""
    k, _, p = stage.shape
    return pad_features(x, k * p).reshape(x.shape[:-1].numel(), k, p)


def _features(out: Tensor, x: Tensor, out_features: int) -> Tensor:
    """``(rows, ., .)`` as the first outputs of x's shape."""
    return out.flatten(1)[:, :out_features].reshape(*x.shape[:-1], out_features)
