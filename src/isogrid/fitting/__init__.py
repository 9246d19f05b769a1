"""Solvers that formats share."""

from isogrid.fitting.descent import descend
from isogrid.fitting.low_rank import balance, dominant_inputs, leading_left, low_rank
from isogrid.fitting.metric import Metric, cholesky, squared_norm, widened
from isogrid.fitting.slices import fit_slices, project_slices

__all__ = [
    "Metric",
    "balance",
    "cholesky",
    "descend",
    "dominant_inputs",
    "fit_slices",
    "leading_left",
    "low_rank",
    "project_slices",
    "squared_norm",
    "widened",
]
