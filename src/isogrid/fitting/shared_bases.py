"""Blocks ``left[i] diag(coupling[i, j]) right[j]``: preconditioned descent on the bases and the couplings.

Each factor takes a damped Newton step on its own quadratic in turn (Lee et al. 2024, Alg. 2, corrected: the coupling
step uses the row block's Gram of the left and the column block's Gram of the right basis). Steps longer than
the exact one, shortened over the sweeps, pass by the slow valleys of exact alternation; they are not monotone, so the
best iterate is kept. A metric over the inputs enters every Gram matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric, cholesky
from isogrid.fitting.report import OnStep


def shared_bases(
    target: Tensor,
    metric: Metric | None,
    start: dict[str, Tensor],
    *,
    sweeps: int,
    relaxation: float = 2.0,
    damping: float = 0.003,
    on_step: OnStep | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Minimise the weighted error over ``left``, ``coupling`` and ``right``.

    Args:
        target: ``(b s, c p)`` float64.
        metric: metric of the ``c p`` inputs, or None.
        start: ``left (b, s, rank)``, ``right (c, rank, p)``, ``coupling (b, c, rank)``.
        sweeps: rounds over all factors.
        relaxation: first step length in units of the exact step; falls to 1 by two thirds of the sweeps.
        damping: ridge of the Newton steps, relative to the mean diagonal and to the present relative error.
        on_step: called with (sweep, objective of the best iterate).

    Returns:
        (objective, factors) of the best iterate; the start counts as one.
    """
    left, right, coupling = (start[name].clone() for name in ("left", "right", "coupling"))
    (b, s, rank), (c, _, p) = left.shape, right.shape
    n = c * p
    rows = target.reshape(b, s, n)
    moment = None if metric is None else metric.matrix
    by_group = None if moment is None else moment.view(c, p, n)
    rows_moment = rows if moment is None else rows @ moment
    whole = float((rows * rows_moment).sum())
    if whole <= 0:
        return 0.0, {"left": torch.zeros_like(left), "right": right, "coupling": coupling}
    if by_group is not None:
        own = torch.stack([by_group[j, :, j * p : (j + 1) * p] for j in range(c)])
        own_roots = cholesky(own)

    def expanded() -> tuple[Tensor, Tensor]:
        """``(b, rank, n)``: what row block i multiplies its left basis with, and that times the metric."""
        stage = left.new_empty(b, rank, c, p)
        torch.mul(coupling.transpose(1, 2).unsqueeze(-1), right.transpose(0, 1), out=stage)
        stage = stage.view(b, rank, n)
        if by_group is None:
            return stage, stage
        # The couplings mix what the column bases make of the metric: rank small products instead of b large ones.
        moved = torch.bmm(right, by_group)  # (c, rank, n)
        return stage, torch.bmm(coupling.permute(2, 0, 1), moved.transpose(0, 1)).transpose(0, 1)

    def measure() -> tuple[float, Tensor]:
        """Objective, and the error times the metric ``(b, s, n)``, with the present stages."""
        error = torch.baddbmm(rows, left, stage, beta=-1)
        weighted = error if moment is None else torch.baddbmm(rows_moment, left, stage_moment, beta=-1)
        return float(error.flatten().dot(weighted.flatten())), weighted

    stage, stage_moment = expanded()
    value, weighted = measure()
    best = value, {"left": left.clone(), "right": right.clone(), "coupling": coupling.clone()}
    for sweep in range(sweeps):
        length = 1 + (relaxation - 1) * max(0.0, 1 - 1.5 * sweep / max(sweeps, 1))
        ridge = damping * (max(value, 0.0) / whole) ** 0.5 + 1e-13
        # Left bases: row blocks are independent of each other.
        delta = -length * _apply_inverse(weighted @ stage.mT, stage_moment @ stage.mT, ridge)
        left = left + delta
        weighted.baddbmm_(delta, stage_moment)
        # Right bases and couplings: with a metric the column blocks feel each other, so they go in turn.
        inner = left.mT @ left  # (b, rank, rank)
        if moment is not None:
            changed = left.new_empty(b, s, n)  # what the column blocks so far have changed
            for j in range(c):
                columns = slice(j * p, (j + 1) * p)
                wish = weighted[..., columns] + changed[..., : j * p] @ moment[: j * p, columns]
                # (rank, p): the row blocks' slopes, summed under their couplings
                step = (coupling[:, j].unsqueeze(-1) * (left.mT @ wish)).sum(0)
                basis = (coupling[:, j].unsqueeze(1) * coupling[:, j].unsqueeze(2) * inner).sum(0)
                step = torch.cholesky_solve(step.mT, own_roots[j]).mT
                old = coupling[:, j].unsqueeze(-1) * right[j]
                right[j] -= length * _apply_inverse(step.mT, basis, ridge).mT
                difference = left @ (coupling[:, j].unsqueeze(-1) * right[j] - old)  # (b, s, p)
                wish += difference @ own[j]
                slope = ((left.mT @ wish) * right[j]).sum(-1)
                hessian = inner * (right[j] @ own[j] @ right[j].mT)
                coupling[:, j] -= length * _apply_inverse(slope.unsqueeze(1), hessian, ridge)[:, 0]
                changed[..., columns] = left @ (coupling[:, j].unsqueeze(-1) * right[j] - old)
        else:
            step = torch.einsum("brcp,bcr->crp", (left.mT @ weighted).view(b, rank, c, p), coupling)
            basis = torch.einsum("brt,bcr,bct->crt", inner, coupling, coupling)
            right = right - length * _apply_inverse(step.mT, basis, ridge).mT
            stage, stage_moment = expanded()
            _, weighted = measure()
            slope = torch.einsum("brcp,crp->cbr", (left.mT @ weighted).view(b, rank, c, p), right)
            for j in range(c):
                hessian = inner * (right[j] @ right[j].mT)
                coupling[:, j] -= length * _apply_inverse(slope[j].unsqueeze(1), hessian, ridge)[:, 0]
        stage, stage_moment = expanded()
        value, weighted = measure()
        if value < best[0]:
            best = value, {"left": left.clone(), "right": right.clone(), "coupling": coupling.clone()}
        elif not value < 1e3 * best[0]:  # the long steps have lost their way, or met a NaN: go on from the best
            left, right, coupling = (best[1][name].clone() for name in ("left", "right", "coupling"))
            stage, stage_moment = expanded()
            value, weighted = measure()
            relaxation = 1.0
        if on_step is not None:
            on_step(sweep, best[0])
    return best


def _apply_inverse(rows: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """``rows · (gram + ridge · mean diagonal)⁻¹``, batched; the ridge is added in place."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True).clamp(min=1e-300)
    return torch.cholesky_solve(rows.mT, cholesky(gram)).mT
