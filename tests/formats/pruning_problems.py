"""The matrices that pruners and quantizers are compared on, with their inputs' second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid import Metric

F64 = torch.float64


def hand_case() -> tuple[Tensor, Metric]:
    """Two rows of eight, and inputs correlated as 0.5^|i - j| under scales."""
    weight = torch.tensor([[1, -2, 0.5, 3, -1, 0.75, 2, -0.25], [0.25, 1.5, -3, 1, 2, -0.5, -1.25, 1.75]], dtype=F64)
    scales = torch.tensor([1, 2, 0.5, 1, 3, 1, 0.5, 2], dtype=F64)
    distance = (torch.arange(8).unsqueeze(1) - torch.arange(8)).abs()
    return weight, Metric(scales.unsqueeze(1) * scales * 0.5**distance)


def correlated_case() -> tuple[Tensor, Tensor]:
    """64 x 128, and 512 inputs: neighbours correlated at 0.9, of log-normal sizes."""
    source = torch.Generator().manual_seed(0)
    weight, noise = (torch.randn(rows, 128, generator=source, dtype=F64) for rows in (64, 512))
    scales = torch.exp(0.5 * torch.randn(128, generator=source, dtype=F64))
    inputs = noise.clone()
    for j in range(1, 128):
        inputs[:, j] = 0.9 * inputs[:, j - 1] + 0.19**0.5 * noise[:, j]
    return weight, inputs * scales


def relative_loss(weight: Tensor, found: Tensor, moment: Tensor) -> float:
    """``tr(D M Dᵀ) / tr(W M Wᵀ)``."""
    return float((((weight - found) @ moment) * (weight - found)).sum() / ((weight @ moment) * weight).sum())


def loss(weight: Tensor, found: Tensor, moment: Tensor) -> float:
    """``tr(D M Dᵀ)``."""
    return float((((weight - found) @ moment) * (weight - found)).sum())
