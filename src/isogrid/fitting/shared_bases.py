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
    moment = None if metric is None else metric.matrix
    own = None
    if moment is not None:
        own = torch.stack([moment[j * p : (j + 1) * p, j * p : (j + 1) * p] for j in range(c)])
        own_roots = cholesky(own)
    whole = float((target * (target if moment is None else target @ moment)).sum())
    if whole <= 0:
        return 0.0, {"left": torch.zeros_like(left), "right": right, "coupling": coupling}

    def expanded() -> Tensor:
        """``(b, rank, n)``: what row block i multiplies its left basis with."""
        return (coupling.unsqueeze(-1) * right.unsqueeze(0)).transpose(1, 2).reshape(b, rank, n)

    def measure() -> tuple[float, Tensor]:
        """Objective, and the error times the metric ``(b, s, n)``."""
        error = left @ expanded() - target.view(b, s, n)
        weighted = error if moment is None else error @ moment
        return float((error * weighted).sum()), weighted

    value, weighted = measure()
    best = value, {"left": left.clone(), "right": right.clone(), "coupling": coupling.clone()}
    for sweep in range(sweeps):
        length = 1 + (relaxation - 1) * max(0.0, 1 - 1.5 * sweep / max(sweeps, 1))
        ridge = damping * (max(value, 0.0) / whole) ** 0.5 + 1e-13
        # Left bases: row blocks are independent of each other.
        stage = expanded()
        gram = (stage if moment is None else stage @ moment) @ stage.mT
        left = left - length * _apply_inverse(weighted @ stage.mT, gram, ridge)
        value, weighted = measure()
        # Right bases and couplings: with a metric the column blocks feel each other, so they go in turn.
        inner = left.mT @ left  # (b, rank, rank)
        for j in range(c) if moment is not None else [slice(None)]:
            columns = slice(j * p, (j + 1) * p) if isinstance(j, int) else slice(None)
            wish = weighted[..., columns]
            if isinstance(j, int):
                assert own is not None
                step = torch.einsum("bsr,bsp,br->rp", left, wish, coupling[:, j])
                basis = torch.einsum("brt,br,bt->rt", inner, coupling[:, j], coupling[:, j])
                step = torch.cholesky_solve(step.mT, own_roots[j]).mT
                change = -length * _apply_inverse(step.mT, basis, ridge).mT
                old = coupling[:, j].unsqueeze(-1) * right[j]
                right[j] += change
                difference = left @ (coupling[:, j].unsqueeze(-1) * right[j] - old)  # (b, s, p)
                here = wish + difference @ own[j]
                slope = torch.einsum("bsr,bsp,rp->br", left, here, right[j])
                hessian = inner * (right[j] @ own[j] @ right[j].mT)
                delta = -length * _apply_inverse(slope.unsqueeze(1), hessian, ridge)[:, 0]
                coupling[:, j] += delta
                difference = difference + left @ (delta.unsqueeze(-1) * right[j])
                assert moment is not None
                weighted = weighted + difference @ moment[columns]
            else:
                by_column = weighted.view(b, s, c, p)
                step = torch.einsum("bsr,bscp,bcr->crp", left, by_column, coupling)
                basis = torch.einsum("brt,bcr,bct->crt", inner, coupling, coupling)
                right = right - length * _apply_inverse(step.mT, basis, ridge).mT
                value, weighted = measure()
                by_column = weighted.view(b, s, c, p)
                slope = torch.einsum("bcrp,crp->bcr", torch.einsum("bsr,bscp->bcrp", left, by_column), right)
                hessian = inner.unsqueeze(1) * (right @ right.mT).unsqueeze(0)  # (b, c, rank, rank)
                coupling = coupling - length * _apply_inverse(slope.unsqueeze(2), hessian, ridge)[:, :, 0]
        value, weighted = measure()
        if value < best[0]:
            best = value, {"left": left.clone(), "right": right.clone(), "coupling": coupling.clone()}
        elif not value < 1e3 * best[0]:  # the long steps have lost their way, or met a NaN: go on from the best
            left, right, coupling = (best[1][name].clone() for name in ("left", "right", "coupling"))
            value, weighted = measure()
            relaxation = 1.0
        if on_step is not None:
            on_step(sweep, best[0])
    return best


def _apply_inverse(rows: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """``rows · (gram + ridge · mean diagonal)⁻¹``, batched."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-300)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(rows.mT, cholesky(gram + ridge * mean * eye)).mT
