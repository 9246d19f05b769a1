"""Solvers that formats share."""

from isogrid.fitting.alternating import alternating_least_squares
from isogrid.fitting.chains import chain_bonds, chain_bound, chain_multiply, chain_project, chain_shapes
from isogrid.fitting.descent import descend
from isogrid.fitting.general import fit_general, fit_thoroughly
from isogrid.fitting.low_rank import balance, dominant_inputs, leading_left, low_rank, truncated_svd
from isogrid.fitting.metric import Metric, cholesky, squared_norm, widened
from isogrid.fitting.pruning import PRUNERS, Kept, normalized, prune, pruned, refitted
from isogrid.fitting.report import FitReport, OnStep, rank_bound, rank_errors
from isogrid.fitting.shared_bases import shared_bases
from isogrid.fitting.slices import fit_slices, project_slices
from isogrid.fitting.structure_removal import Removal, columns_of, kept_weights, removal_cost, removal_order, swapped
from isogrid.fitting.supports import Groups, Pattern, sweep_supports
from isogrid.fitting.sweep import Rounding, damped_moment, inverse_root, kept_of, largest_of_groups, sweep_columns

__all__ = [
    "PRUNERS",
    "FitReport",
    "Groups",
    "Kept",
    "Metric",
    "OnStep",
    "Pattern",
    "Removal",
    "Rounding",
    "alternating_least_squares",
    "balance",
    "chain_bonds",
    "chain_bound",
    "chain_multiply",
    "chain_project",
    "chain_shapes",
    "cholesky",
    "columns_of",
    "damped_moment",
    "descend",
    "dominant_inputs",
    "fit_general",
    "fit_slices",
    "fit_thoroughly",
    "inverse_root",
    "kept_of",
    "kept_weights",
    "largest_of_groups",
    "leading_left",
    "low_rank",
    "normalized",
    "project_slices",
    "prune",
    "pruned",
    "rank_bound",
    "rank_errors",
    "refitted",
    "removal_cost",
    "removal_order",
    "shared_bases",
    "squared_norm",
    "swapped",
    "sweep_columns",
    "sweep_supports",
    "truncated_svd",
    "widened",
]
