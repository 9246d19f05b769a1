"""Targets that repair what the layers before have lost: the original outputs from the compressed part's inputs.

With x a layer's input in the original model and x' in the compressed one, the matrix that comes nearest to the original
outputs, ``E ||W x - V x'||²``, is the fit to ``T = W K M⁻¹`` under ``M = E[x' x'ᵀ]``, with ``K = E[x x'ᵀ]`` (AA-SVD's
objective 4 for any format; fitting theory 1). Damping is added to K and M alike, so that T stays W where the data are
silent (fitting theory 2.2); then ``T = W + W E[(x - x') x'ᵀ] M⁻¹``: only the drift between the two has to be summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.fitting import Metric, widened


@dataclass(frozen=True)
class Drift:
    """How a layer's inputs have moved, ``x - x'``.

    Attributes:
        shift: ``(n,)`` mean ``E[x - x']``.
        cross: ``(n, n)`` ``E[(x - x') x'ᵀ]``.
        centred: ``(n, n)`` the same about both means.
    """

    shift: Tensor
    cross: Tensor
    centred: Tensor


@dataclass
class DriftSum:
    """Running sums over pairs of rows: float32 products about a fixed point, float64 sums."""

    product: Tensor | None = None  # Σ (x - x')(x' - point)ᵀ
    moved: Tensor | None = None  # Σ (x - x')
    total: Tensor | None = None  # Σ (x' - point)
    point: Tensor | None = None
    rows: int = 0

    def add(self, original: Tensor, present: Tensor) -> None:
        """Add rows ``(rows, n)`` of the original model and, in the same order, of the compressed one."""
        if present.shape[0] == 0:
            return
        present = present.detach().to(torch.float32)
        difference = original.detach().to(torch.float32) - present
        if self.point is None:
            self.point = present.mean(0)
        about = present - self.point
        parts = widened(difference.mT @ about), widened(difference.sum(0)), widened(about.sum(0))
        if self.product is None or self.moved is None or self.total is None:
            self.product, self.moved, self.total = parts
        else:
            self.product += parts[0]
            self.moved += parts[1]
            self.total += parts[2]
        self.rows += present.shape[0]

    def drift(self) -> Drift | None:
        """The means; None without rows, or where they are not finite."""
        if self.product is None or self.moved is None or self.total is None or self.point is None:
            return None
        product, shift, mean = self.product / self.rows, self.moved / self.rows, self.total / self.rows
        if not (torch.isfinite(product).all() and torch.isfinite(shift).all()):
            return None
        return Drift(
            shift=shift,
            cross=product + torch.outer(shift, widened(self.point)),
            centred=product - torch.outer(shift, mean),
        )


def anchored_target(matrix: Tensor, metric: Metric, cross: Tensor, strength: float = 1.0) -> Tensor:
    """``W + strength · W cross M⁻¹``, float64: between W (0) and the target that restores the original outputs (1).

    Args:
        matrix: ``(out, n)`` the trained W.
        metric: of the compressed part's inputs, centred where ``cross`` is.
        cross: ``(n, n)`` see `Drift`.
        strength: from 0 to 1 (SAES-SVD's mixture).
    """
    wide = widened(matrix)
    step = torch.cholesky_solve((wide @ cross.to(wide)).mT, metric.to(wide.device).root).mT
    return wide + strength * step


def output_distance(matrix: Tensor, near: Tensor, *, cross: Tensor, moment: Tensor, energy: float) -> float:
    """``E ||W x - V x'||²`` on the rows that were summed.

    Args:
        matrix: ``(out, n)`` W.
        near: ``(out, n)`` V, float64.
        cross: ``(n, n)`` see `Drift`.
        moment: ``(n, n)`` ``E[x' x'ᵀ]``, centred where ``cross`` is, undamped.
        energy: ``E ||W x||²``, likewise.
    """
    moment, cross = moment.to(near), cross.to(near)
    difference = widened(matrix).to(near) - near
    # W x - V x' = W (x - x') + (W - V) x', and E ||W (x - x')||² follows from the energy.
    wide = widened(matrix).to(near)
    moved = energy - float(((wide @ (moment + cross + cross.mT)) * wide).sum())
    both = 2 * float(((wide @ cross) * difference).sum()) + float(((difference @ moment) * difference).sum())
    return max(moved + both, 0.0)
