"""What a fit reached, against the best that any factors of its kind could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isogrid.fitting.metric import Metric

OnStep = Callable[[int, float], None]
"""Called by iterative solvers with (iteration, objective); iteration 0 is the start."""


@dataclass(frozen=True)
class FitReport:
    """What a fit reached.

    Attributes:
        objective: ``||(T - V) M^½||_F²`` of the factors as returned, their dtype included; float64.
        whole: ``||T M^½||_F²``, the objective of a matrix of zeros.
        lower_bound: no member of the format with these hyper-parameters has a smaller objective; None where no bound
            is known. Equal to the objective where the fit is the global optimum.
        iterations: last iteration that the solver told of; 0 for closed forms.
        seconds: time of the fit.
    """

    objective: float
    whole: float
    lower_bound: float | None
    iterations: int
    seconds: float

    @property
    def error(self) -> float:
        """Relative error ``||(T - V) M^½|| / ||T M^½||``; 0 for a target of zeros."""
        return (self.objective / self.whole) ** 0.5 if self.whole > 0 else 0.0

    @property
    def least_error(self) -> float | None:
        """The relative error that the lower bound stands for."""
        if self.lower_bound is None:
            return None
        return (self.lower_bound / self.whole) ** 0.5 if self.whole > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "objective": self.objective,
            "whole": self.whole,
            "lower_bound": self.lower_bound,
            "error": self.error,
            "least_error": self.least_error,
            "iterations": self.iterations,
            "seconds": self.seconds,
        }


def rank_bound(rows: Tensor, ranks: Tensor | int, metric: Metric | None) -> float:
    """Least weighted error of matrices of bounded rank, summed over a batch.

    Args:
        rows: ``(..., s, n)`` target matrices over the same n inputs, float64.
        ranks: rank bound of each, ``(...)``, or one for all.
        metric: metric of the n inputs, or None.

    Returns:
        The squared singular values of ``rows · L`` beyond the ranks (``M = L Lᵀ``; fitting theory 3.7).
    """
    weighted = rows if metric is None else rows @ metric.root
    sigma = torch.linalg.svdvals(weighted)
    index = torch.arange(sigma.shape[-1], device=sigma.device)
    beyond = index >= (ranks.unsqueeze(-1) if isinstance(ranks, Tensor) else ranks)
    return float((sigma.square() * beyond).sum())


def rank_errors(target: Tensor, metric: Metric | None) -> list[float]:
    """Least weighted error of rank 1, 2, … min(out, in): tails of the squared singular values of ``target · L``."""
    sigma = torch.linalg.svdvals(target if metric is None else target @ metric.to(target.device).root)
    tails = sigma.square().flip(0).cumsum(0).flip(0)
    return [*(float(value) for value in tails[1:]), 0.0]
