"""The column sweep of Optimal Brain Surgeon: columns get their final values from left to right, and what a column loses
is made up for by those after it.

SparseGPT (Frantar and Alistarh 2023) and GPTQ (Frantar et al. 2022) are this sweep; they differ in the values that a
column may take, which a `Rounding` says.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from isogrid.errors import IsogridError, IsogridWarning
from isogrid.fitting.metric import Metric, cholesky

# Columns that are compensated one by one; those behind them get the sum, one product a block.
BLOCK = 128
DAMPING = 0.01


class Rounding(ABC):
    """The values that a column may take, chosen while the sweep goes on; one object serves one sweep."""

    def begin(self, first: int, current: Tensor) -> None:  # noqa: B027 - most have nothing to prepare
        """A block begins at column ``first``; ``current (rows, width)`` are its columns, compensated so far."""

    @abstractmethod
    def column(self, j: int, rest: Tensor) -> Tensor:
        """The final column j, ``(rows,)``; ``rest (rows, …)`` is it and the block's columns behind it as they are."""


def sweep_columns(target: Tensor, root: Tensor, rounding: Rounding, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Round the columns of a matrix one after the other, each error made up for by the columns behind it.

    Args:
        target: ``(out, in)`` float64.
        root: ``(in, in)`` of `inverse_root`.
        rounding: what a column is rounded to.
        block: columns of a block; changes nothing but the speed where the rounding sees single columns.

    Returns:
        ``rounded (out, in)`` and ``errors (out, in)``, whose squares add up to ``tr((W - V) H (W - V)ᵀ)``.
    """
    current, rounded, errors = target.clone(), torch.empty_like(target), torch.empty_like(target)
    n = target.shape[1]
    for first in range(0, n, block):
        last = min(first + block, n)
        own = current[:, first:last].clone()
        rounding.begin(first, own)
        for j in range(first, last):
            rest = own[:, j - first :]
            column = rounding.column(j, rest)
            error = (rest[:, 0] - column) / root[j, j]
            rounded[:, j], errors[:, j] = column, error
            rest.addr_(error, root[j, j:last], alpha=-1)
        current[:, last:] -= errors[:, first:last] @ root[first:last, last:]
    return rounded, errors


def damped_moment(metric: Metric | None, n: int, damping: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """The published Hessian: the moment with ``damping`` of its mean diagonal added, and which inputs never fire.

    Args:
        metric: of the inputs; None is the identity, which is left as it is.
        n: number of inputs.
        damping: share of the mean diagonal, at least 0.
        like: tensor whose dtype and device the result has.

    Returns:
        ``hessian (n, n)``, on whose diagonal dead inputs have the mean of the others (published: 1, which lets the
        inputs' scale decide how much is added to all), and ``dead (n,)`` booleans.

    Raises:
        IsogridError: damping negative or not finite.
    """
    if not 0 <= damping < float("inf"):
        raise IsogridError(f"damping is a share of the mean diagonal, at least 0; got {damping}")
    if metric is None:
        identity = torch.eye(n, dtype=like.dtype, device=like.device)
        return identity, torch.zeros(n, dtype=torch.bool, device=like.device)
    hessian = metric.moment.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1 if dead.all() else diagonal[~dead].mean()
    diagonal += damping * diagonal.mean()
    return hessian, dead


def inverse_root(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``H⁻¹ = Uᵀ U``; a Hessian without full rank gets a growing ridge, and a warning says so.

    ``H = R Rᵀ`` with R upper triangular, from the factorisation of the matrix turned round; then ``U = R⁻¹``. No
    inverse of H is formed.
    """
    turned = hessian.flip(0, 1)
    root, failed = torch.linalg.cholesky_ex(turned)
    ridge = 0.01
    while bool(failed) and ridge <= 1:
        warnings.warn(
            f"the inputs' second moment has no full rank; {ridge:g} of its mean diagonal is added. Give more "
            "calibration rows, or a larger damping",
            IsogridWarning,
            stacklevel=2,
        )
        identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        root, failed = torch.linalg.cholesky_ex(turned + ridge * turned.diagonal().mean() * identity)
        ridge *= 10
    if bool(failed):
        root = cholesky(turned)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(root.flip(0, 1), identity, upper=True)


class KeepMask(Rounding):
    """Entries outside a mask ``(out, in)`` become zero: the update of a pruner, for any pattern."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def column(self, j: int, rest: Tensor) -> Tensor:
        """The entries of the mask."""
        return rest[:, 0] * self.mask[:, j]


class KeepGroups(Rounding):
    """``keep`` of every aligned ``of`` entries of a row, chosen when the sweep reaches the group (SparseGPT's n:m).

    The score of an entry is ``w² / U_jj²``, with w as compensated so far. Attribute ``mask (out, in)`` is the choice.
    """

    def __init__(self, shape: torch.Size, root: Tensor, keep: int, of: int) -> None:
        self.mask = torch.zeros(shape, dtype=torch.bool, device=root.device)
        self.diagonal, self.keep, self.of = root.diagonal(), keep, of

    def column(self, j: int, rest: Tensor) -> Tensor:
        """At a group's first column its entries are chosen; then those chosen are kept."""
        if j % self.of == 0:
            group = rest[:, : self.of]
            scores = group.square() / self.diagonal[j : j + group.shape[1]].square()
            self.mask[:, j : j + group.shape[1]] = largest_of_groups(scores, self.keep, self.of)
        return rest[:, 0] * self.mask[:, j]


class KeepShare(Rounding):
    """``count`` entries of the matrix, an equal share of every block of columns, chosen when a block begins.

    SparseGPT's unstructured mask, with exact counts where its thresholds prune one entry too many. Attribute
    ``mask (out, in)`` is the choice.
    """

    def __init__(self, shape: torch.Size, root: Tensor, count: int) -> None:
        self.mask = torch.zeros(shape, dtype=torch.bool, device=root.device)
        self.diagonal, self.count = root.diagonal(), count

    def begin(self, first: int, current: Tensor) -> None:
        """The block's entries of largest ``w² / U_jj²``."""
        width, n = current.shape[1], self.mask.shape[1]
        share = round(self.count * (first + width) / n) - round(self.count * first / n)
        scores = current.square() / self.diagonal[first : first + width].square()
        self.mask[:, first : first + width] = largest(scores, share)

    def column(self, j: int, rest: Tensor) -> Tensor:
        """The entries chosen."""
        return rest[:, 0] * self.mask[:, j]


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest entries of a matrix, exactly; ties go to the earlier entry."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return mask.view(scores.shape)


def largest_of_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    """Mask of the ``keep`` largest of every ``of`` entries of a row; a last short group keeps its share, rounded up.

    Ties go to the earlier entry.
    """
    rows, n = scores.shape
    whole = n // of * of
    mask = torch.zeros(rows, n, dtype=torch.bool, device=scores.device)
    for first, last, size in ((0, whole, of), (whole, n, n - whole)):
        if first == last:
            continue
        groups = scores[:, first:last].reshape(-1, size)
        chosen = groups.sort(dim=-1, descending=True, stable=True).indices[:, : kept_of(size, keep, of)]
        mask[:, first:last] = (
            torch.zeros_like(groups, dtype=torch.bool).scatter_(1, chosen, True).view(rows, last - first)
        )
    return mask


def kept_of(size: int, keep: int, of: int) -> int:
    """Entries kept of a group of ``size``, at most ``of``, entries: all of them less the share pruned, rounded down."""
    return size - (of - keep) * size // of
