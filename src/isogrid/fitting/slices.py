"""Matrices cut into a grid of independent low-rank slices: Monarch, Block Tensor-Train, block low rank.

Rows fall into groups a, columns into groups c, and slice (a, c) is any matrix of rank at most b(a, c). Without a
metric the best such matrix is one small SVD per slice. A metric couples the slices of a row group; exact block
descent then lowers the objective until it stands (fitting theory 3.5 and 4.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.fitting.low_rank import leading_left, truncated_svd
from isogrid.fitting.metric import Metric, cholesky
from isogrid.fitting.report import OnStep

# Rows of the joint left update hold (columns groups · rank, n) numbers per row group; this bounds their number.
JOINT_CHUNK = 2**25


def project_slices(blocks: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Best approximation of every slice ``(A, C, s, p)`` by rank ``ranks[a, c]``: an SVD each (Dao et al. 2022, Thm 1).

    Returns ``left (A, C, s, b)`` and ``right (A, C, b, p)``, balanced, with ``b = ranks.max()``; columns and rows
    beyond a slice's own rank are zero.
    """
    width = min(int(ranks.max()), *blocks.shape[-2:])
    return _balanced(*truncated_svd(blocks, width), ranks)


def fit_slices(
    blocks: Tensor,
    ranks: Tensor,
    metric: Metric,
    *,
    sweeps: int = 3,
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

    width = min(int(ranks.max()), s, p)
    if width == 0:
        return project_slices(blocks, ranks)
    left, right = _truncate(blocks @ roots, roots, ranks, width)
    objective = None
    for step in range(sweeps + 1):
        fitted = left @ right  # (A, C, s, p)
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
            left[:, c], right[:, c] = _truncate(wish, roots[c], ranks[:, c], width)
            residual -= (left[:, c] @ right[:, c] - fitted[:, c]) @ by_column[c]
        left, right = _joint_left(right, ranks, target_moment, moment)
    # Rows of `right` need not be orthonormal: their triangular factor moves left before the split.
    q, r = torch.linalg.qr(right.mT)
    u, sigma, vh = torch.linalg.svd(left @ r.mT, full_matrices=False)
    return _balanced(u, sigma, vh @ q.mT, ranks)


def _rank_mask(ranks: Tensor, width: int) -> Tensor:
    """``(..., width)`` ones where a direction is within the slice's rank."""
    return (torch.arange(width, device=ranks.device) < ranks.unsqueeze(-1)).to(torch.float64)


def _truncate(weighted: Tensor, roots: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``left · right`` nearest to ``weighted · roots⁻¹`` under the metric with those roots; batched, mixed ranks."""
    left = leading_left(weighted, width) * _rank_mask(ranks, width).unsqueeze(-2)
    return left, torch.linalg.solve_triangular(roots, left.mT @ weighted, upper=False, left=False)


def _balanced(u: Tensor, sigma: Tensor, vh: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """``u σ`` and ``vh`` shared out evenly, cut to the ranks; a missing direction keeps a unit row on the right."""
    kept = sigma.shape[-1]
    alive = sigma > sigma[..., :1] * 1e-14
    scale = torch.where(alive, sigma, torch.ones_like(sigma)).sqrt()
    mask = _rank_mask(ranks, kept)
    left = u * (torch.where(alive, sigma, torch.zeros_like(sigma)) / scale * mask).unsqueeze(-2)
    right = vh * (scale * mask).unsqueeze(-1)
    surplus = int(ranks.max()) - kept  # a rank beyond the slice's sides: hidden units with nothing to do
    if surplus:
        left = torch.nn.functional.pad(left, (0, surplus))
        right = torch.nn.functional.pad(right, (0, 0, 0, surplus))
    return left, right


def _joint_left(right: Tensor, ranks: Tensor, target_moment: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The best left factors for the row spaces of ``right (A, C, b, p)``, and orthonormal rows that span these."""
    groups, columns, width, p = right.shape
    s, n = target_moment.shape[1:]
    mask = _rank_mask(ranks, width)
    rows = torch.linalg.qr(right.mT).Q.mT * mask.unsqueeze(-1)  # (A, C, b, p), orthonormal or zero
    left = rows.new_empty(groups, columns, s, width)
    chunk = max(1, JOINT_CHUNK // max(columns * width * n, 1))
    for start in range(0, groups, chunk):
        part = slice(start, min(start + chunk, groups))
        g = part.stop - start
        rows_moment = rows[part].transpose(0, 1).reshape(columns, g * width, p) @ moment.view(columns, p, n)
        # (C, g b, n) -> for every second column group d: (g, d, C b, p) @ (g, d, p, b')
        by_group = rows_moment.view(columns, g, width, columns, p).permute(1, 3, 0, 2, 4)
        gram = by_group.reshape(g, columns, columns * width, p) @ rows[part].mT  # (g, d, C b, b')
        gram = gram.permute(0, 2, 1, 3).reshape(g, columns * width, columns * width)
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None].clamp(min=1e-300)
        idle = mask[part].reshape(g, -1) == 0
        gram = gram + torch.diag_embed(torch.where(idle, mean, 1e-13 * mean))
        wish = target_moment[part].view(g, s, columns, p).transpose(1, 2) @ rows[part].mT  # (g, C, s, b)
        wish = wish.transpose(1, 2).reshape(g, s, columns * width)
        solved = torch.cholesky_solve(wish.mT, cholesky(gram))  # (g, C b, s)
        left[part] = solved.mT.reshape(g, s, columns, width).transpose(1, 2)
    return left, rows
