"""Matrices cut into a grid of independent low-rank slices: Monarch, Block Tensor-Train, block low rank.

Rows fall into groups a, columns into groups c, and slice (a, c) is any matrix of rank at most b(a, c). Without a
metric the best such matrix is one small SVD per slice. A metric couples the slices of a row group; exact block
descent then lowers the objective until it stands (fitting theory 3.5 and 4.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric, cholesky

OnStep = Callable[[int, float], None]

# Rows of the joint left update hold (columns groups · rank, n) numbers per row group; this bounds their number.
JOINT_CHUNK = 2**25


def project_slices(blocks: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Best approximation of every slice ``(A, C, s, p)`` by rank ``ranks[a, c]``: one batched SVD (Dao et al. 2022, Thm 1).

    Returns ``left (A, C, s, b)`` and ``right (A, C, b, p)``, balanced, with ``b = ranks.max()``; columns and rows
    beyond a slice's own rank are zero.
    """
    return _split(blocks, ranks)


def fit_slices(
    blocks: Tensor,
    ranks: Tensor,
    metric: Metric,
    *,
    sweeps: int = 4,
    tolerance: float = 1e-3,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Approximate all slices jointly under a metric over the whole input.

    Args:
        blocks: ``(A, C, s, p)`` float64; slice (a, c) of the target, columns in input order (input ``c p + i``).
        ranks: ``(A, C)`` integer ranks.
        metric: metric of the ``C p`` inputs.
        sweeps: most rounds of block descent; 0 keeps the block-metric start.
        tolerance: stop when a round lowers the objective by less than this fraction.
        on_step: called with (round, objective); round 0 is the start.

    Returns:
        ``left (A, C, s, b)`` and ``right (A, C, b, p)``, balanced, b the largest rank.

    Start: every slice is the best under its own column group's diagonal block of the metric. A round then (1) takes
    the column groups in turn, each slice the global optimum while the others stand still, and (2) refits all left
    factors at once for the row spaces found. Both are exact minimisations, so the objective never rises.
    """
    groups, columns, s, p = blocks.shape
    n = columns * p
    moment = metric.matrix
    target = blocks.transpose(1, 2).reshape(groups, s, n)  # (A, s, n)
    target_moment = target @ moment
    by_column = moment.view(columns, p, n)
    roots = cholesky(torch.stack([by_column[c, :, c * p : (c + 1) * p] for c in range(columns)]))  # (C, p, p)

    weighted = blocks @ roots  # (A, C, s, p)
    fitted = _left_project(weighted, blocks, ranks)
    objective = None
    for step in range(sweeps + 1):
        approximation = fitted.transpose(1, 2).reshape(groups, s, n)
        residual = target_moment - approximation @ moment  # (A, s, n)
        value = max(float(((target - approximation) * residual).sum()), 0.0)
        if on_step is not None:
            on_step(step, value)
        done = objective is not None and objective - value <= tolerance * objective
        objective = value
        if done or step == sweeps:
            break
        for c in range(columns):
            part = residual[:, :, c * p : (c + 1) * p]
            # Whitened target of this column group while the others stand still.
            wish = torch.linalg.solve_triangular(roots[c].mT, part, upper=True, left=False) + fitted[:, c] @ roots[c]
            unwhitened = torch.linalg.solve_triangular(roots[c], wish, upper=False, left=False)
            new = _left_project(wish, unwhitened, ranks[:, c])
            residual -= (new - fitted[:, c]) @ by_column[c]
            fitted[:, c] = new
        fitted = _joint_left(fitted, ranks, target_moment, moment)
    return _split(fitted, ranks)


def _rank_mask(ranks: Tensor, width: int) -> Tensor:
    """``(..., width)`` ones where a direction is within the slice's rank."""
    return (torch.arange(width, device=ranks.device) < ranks.unsqueeze(-1)).to(torch.float64)


def _left_project(weighted: Tensor, plain: Tensor, ranks: Tensor) -> Tensor:
    """``U_b U_bᵀ plain`` with U_b the leading left singular directions of ``weighted``, batched with mixed ranks."""
    width = int(ranks.max())
    if width == 0:
        return torch.zeros_like(plain)
    u = torch.linalg.svd(weighted, full_matrices=False).U
    u = u[..., : min(width, u.shape[-1])]
    u = u * _rank_mask(ranks, u.shape[-1]).unsqueeze(-2)
    return u @ (u.mT @ plain)


def _split(blocks: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of slices cut to their ranks; a missing direction keeps a unit row on the right (see low_rank)."""
    width = int(ranks.max())
    u, sigma, vh = torch.linalg.svd(blocks, full_matrices=False)
    kept = min(width, sigma.shape[-1])
    u, sigma, vh = u[..., :kept], sigma[..., :kept], vh[..., :kept, :]
    alive = sigma > sigma.amax(-1, keepdim=True) * 1e-14
    scale = torch.where(alive, sigma, torch.ones_like(sigma)).sqrt()
    mask = _rank_mask(ranks, kept)
    left = u * (torch.where(alive, sigma, torch.zeros_like(sigma)) / scale * mask).unsqueeze(-2)
    right = vh * (scale * mask).unsqueeze(-1)
    surplus = width - kept  # a rank beyond the slice's sides: hidden units with nothing to do
    if surplus:
        left = torch.nn.functional.pad(left, (0, surplus))
        right = torch.nn.functional.pad(right, (0, 0, 0, surplus))
    return left, right


def _joint_left(fitted: Tensor, ranks: Tensor, target_moment: Tensor, moment: Tensor) -> Tensor:
    """Refit the left factors of every row group for the row spaces that its slices have."""
    groups, columns, s, p = fitted.shape
    n = columns * p
    width = min(int(ranks.max()), s, p)
    out = torch.empty_like(fitted)
    chunk = max(1, JOINT_CHUNK // max(columns * width * n, 1))
    for start in range(0, groups, chunk):
        part = slice(start, min(start + chunk, groups))
        g = part.stop - start
        _, sigma, vh = torch.linalg.svd(fitted[part], full_matrices=False)
        # A direction that a slice does not use would make the normal equations singular.
        mask = _rank_mask(ranks[part], width) * (sigma[..., :width] > sigma[..., :1] * 1e-12)
        rows = vh[..., :width, :] * mask.unsqueeze(-1)  # (g, C, b, p), orthonormal or zero
        rows_moment = torch.einsum("acbp,cpn->acbn", rows, moment.view(columns, p, n))
        gram = torch.einsum("acbdp,adep->acbde", rows_moment.view(g, columns, width, columns, p), rows)
        gram = gram.reshape(g, columns * width, columns * width)
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
        idle = mask.reshape(g, -1) == 0
        gram = gram + torch.diag_embed(torch.where(idle, mean.clamp(min=1e-300), 1e-13 * mean))
        right_side = torch.einsum("ascp,acbp->ascb", target_moment[part].view(g, s, columns, p), rows)
        solved = torch.cholesky_solve(right_side.reshape(g, s, -1).mT, cholesky(gram))  # (g, C b, s)
        left = solved.mT.reshape(g, s, columns, width).transpose(1, 2)  # (g, C, s, b)
        out[part] = left @ rows
    return out
