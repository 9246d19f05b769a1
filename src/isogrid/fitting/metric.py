"""What an error costs: the second moment of a layer's inputs.

``E ||(W - V) x||² = tr((W - V) M (W - V)ᵀ)`` with ``M = E[x xᵀ]``, so a fit under the metric ``M`` is the fit that
keeps a layer's *outputs*. One `Metric` belongs to one input tensor; layers that share the input share the metric and
with it every root it has computed.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from isogrid.errors import IsogridError

# Floor for inputs that never fire, relative to the mean diagonal: keeps roots invertible, costs nothing in J.
DEAD_INPUT_FLOOR = 1e-8
WITHOUT_FLOAT64 = frozenset({"mps"})


def widened(value: Tensor) -> Tensor:
    """The tensor in float64, which fits are solved in; on the CPU where its own device has no float64 (Apple's mps)."""
    if value.device.type in WITHOUT_FLOAT64:
        value = value.cpu()
    return value.to(torch.float64)


class Metric:
    """Second moment of inputs with its mean and row count; roots are computed once, in float64.

    Args:
        moment: ``(n, n)`` second moment ``E[x xᵀ]``, symmetric positive semidefinite. Any positive multiple of it
            gives the same fit.
        mean: ``(n,)`` mean input, or None.
        rows: number of rows the moment was averaged over, or None when it is exact.
        damping: ridge relative to the diagonal, ``M + damping · diag(M)``. None: ``min(0.1, 4 (n / rows)²)``, or 0
            for an exact moment. Diagonal rather than identity damping, so that outlier channels don't set it and
            folding a norm's gains into the weights changes nothing.

    Raises:
        IsogridError: the moment is not square, not finite or not symmetric.
    """

    def __init__(
        self,
        moment: Tensor,
        *,
        mean: Tensor | None = None,
        rows: int | None = None,
        damping: float | None = None,
    ) -> None:
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            raise IsogridError(f"a metric is a square matrix (in, in), got shape {tuple(moment.shape)}")
        moment = widened(moment.detach())
        if not torch.isfinite(moment).all():
            raise IsogridError("the metric has NaN or infinite entries; check the calibration inputs")
        scale = moment.abs().max()
        if (moment - moment.mT).abs().max() > 1e-3 * scale:
            raise IsogridError("a metric is symmetric, E[x xᵀ]; got a matrix that differs from its transpose")
        if (moment.diagonal() < 0).any():
            raise IsogridError("a metric has no negative diagonal entries; this is no second moment")
        self.moment = (moment + moment.mT) / 2
        self.mean = None if mean is None else widened(mean.detach())
        self.rows = rows
        if damping is None:
            damping = 0.0 if rows is None else min(0.1, 4.0 * (self.in_features / max(rows, 1)) ** 2)
        self.damping = damping

    @classmethod
    def from_rows(cls, rows: Tensor, *, damping: float | None = None) -> Metric:
        """The metric of samples ``(..., n)``, each row weighted equally."""
        flat = widened(rows.detach().reshape(-1, rows.shape[-1]))
        if flat.shape[0] == 0:
            raise IsogridError("no rows to take a second moment of; give at least one calibration row")
        return cls(flat.mT @ flat / flat.shape[0], mean=flat.mean(0), rows=flat.shape[0], damping=damping)

    @property
    def in_features(self) -> int:
        """Number of inputs n."""
        return self.moment.shape[0]

    @cached_property
    def matrix(self) -> Tensor:
        """``(n, n)`` damped moment, positive definite: what fits minimise under."""
        diagonal = self.moment.diagonal()
        mean = diagonal.mean()
        # A moment that is zero throughout says nothing about errors: every one costs the same.
        if mean == 0:
            return torch.eye(self.in_features, dtype=torch.float64, device=self.moment.device)
        floor = (DEAD_INPUT_FLOOR * mean - diagonal).clamp(min=0)
        return self.moment + torch.diag(self.damping * diagonal + floor)

    @cached_property
    def root(self) -> Tensor:
        """``(n, n)`` lower triangular L with ``L Lᵀ = matrix``."""
        return cholesky(self.matrix)

    @cached_property
    def centred(self) -> Metric:
        """The metric of ``x - E x``: what errors cost when a bias takes up their mean. Itself if no mean is known."""
        if self.mean is None:
            return self
        moment = self.moment - torch.outer(self.mean, self.mean)
        # Rounding may leave a constant input with a tiny negative variance.
        moment.diagonal().clamp_(min=0)
        return Metric(moment, rows=self.rows, damping=self.damping)

    def padded(self, n: int) -> Metric:
        """The metric with zero inputs appended up to ``n``; itself when nothing is to append."""
        extra = n - self.in_features
        if extra == 0:
            return self
        moment = torch.nn.functional.pad(self.matrix, (0, extra, 0, extra))
        moment.diagonal()[self.in_features :] = DEAD_INPUT_FLOOR * self.matrix.diagonal().mean()
        return Metric(moment, damping=0.0)

    def permuted(self, order: Tensor) -> Metric:
        """The metric of ``x[order]``."""
        return Metric(self.matrix[order][:, order], damping=0.0)

    def squared_norm(self, error: Tensor) -> float:
        """``tr(E M Eᵀ)`` of an error matrix ``E`` (out, n) on any device, M damped."""
        error = error.to(self.matrix)  # its dtype and device
        return max(float(((error @ self.matrix) * error).sum()), 0.0)

    def fresh(self) -> Metric:
        """The same moment without the roots computed so far: they go with this copy when it goes."""
        return Metric(self.moment, mean=self.mean, rows=self.rows, damping=self.damping)

    def to(self, device: torch.device | str) -> Metric:
        """The metric on another device; itself when it is there."""
        if self.moment.device == torch.device(device):
            return self
        mean = None if self.mean is None else self.mean.to(device)
        return Metric(self.moment.to(device), mean=mean, rows=self.rows, damping=self.damping)


def squared_norm(error: Tensor, metric: Metric | None) -> float:
    """``||E M^½||_F²``; ``metric=None`` is the identity."""
    if metric is None:
        return float(widened(error).square().sum())
    return metric.squared_norm(error)


def cholesky(matrix: Tensor) -> Tensor:
    """Lower root of one or a batch of positive definite matrices ``(..., n, n)``, in float64.

    A matrix that is not positive definite to rounding gets a growing diagonal ridge, five tries, then its
    eigenvalues clipped at 1e-10 of the largest.
    """
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not failed.any():
        return root
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    ridge = diagonal.mean(-1, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    for exponent in range(-12, -7):
        root, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(10.0**exponent * (diagonal + ridge)))
        if not failed.any():
            return root
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[..., -1:].clamp(min=torch.finfo(matrix.dtype).tiny) * 1e-10
    half = vectors * values.clamp(min=floor).sqrt().unsqueeze(-2)  # half halfᵀ = clipped matrix
    r = torch.linalg.qr(half.mT, mode="r").R
    root = r.mT
    return root * root.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
