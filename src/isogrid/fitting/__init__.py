"""Solvers that formats share."""

from isogrid.fitting.alternating import alternating_least_squares
from isogrid.fitting.chains import chain_bonds, chain_bound, chain_multiply, chain_project, chain_shapes
from isogrid.fitting.descent import descend
from isogrid.fitting.general import fit_general, fit_thoroughly
from isogrid.fitting.low_rank import balance, dominant_inputs, leading_left, low_rank, truncated_svd
from isogrid.fitting.metric import Metric, cholesky, squared_norm, widened
from isogrid.fitting.report import FitReport, OnStep, rank_bound, rank_errors
from isogrid.fitting.shared_bases import shared_bases
from isogrid.fitting.slices import fit_slices, project_slices

__all__ = [
    "FitReport",
    "Metric",
    "OnStep",
    "alternating_least_squares",
    "balance",
    "chain_bonds",
    "chain_bound",
    "chain_multiply",
    "chain_project",
    "chain_shapes",
    "cholesky",
    "descend",
    "dominant_inputs",
    "fit_general",
    "fit_slices",
    "fit_thoroughly",
    "leading_left",
    "low_rank",
    "project_slices",
    "rank_bound",
    "rank_errors",
    "shared_bases",
    "squared_norm",
    "truncated_svd",
    "widened",
]
