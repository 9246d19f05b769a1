"""A trained model, made smaller: select, calibrate, allocate, fit."""

from isogrid.compress.advise import Advisor
from isogrid.compress.allocate import allocate_uniform
from isogrid.compress.batches import as_batches
from isogrid.compress.calibrate import Moments, collect_moments
from isogrid.compress.distill import Distillation, TokenDistillation, distill
from isogrid.compress.estimate import estimate_seconds
from isogrid.compress.milliseconds import Milliseconds
from isogrid.compress.pipeline import AUTO, as_candidates, compress
from isogrid.compress.plan import Plan
from isogrid.compress.recipes import EFFORTS, Effort, Prediction, Recipe
from isogrid.compress.refine import BlockReport, Refinement
from isogrid.compress.select import select_layers
from isogrid.compress.structured_pruning import How, Pruner, PruningReport, prune, prune_family
from isogrid.compress.summary import (
    CompressionReport,
    LayerReport,
    count_parameters,
    dense_parameters,
    stored_bytes,
    structured_layers,
)
from isogrid.compress.welore import freeze_other_than_low_rank, low_rank_components

__all__ = [
    "AUTO",
    "EFFORTS",
    "Advisor",
    "BlockReport",
    "CompressionReport",
    "Distillation",
    "Effort",
    "How",
    "LayerReport",
    "Milliseconds",
    "Moments",
    "Plan",
    "Prediction",
    "Pruner",
    "PruningReport",
    "Recipe",
    "Refinement",
    "TokenDistillation",
    "allocate_uniform",
    "as_batches",
    "as_candidates",
    "collect_moments",
    "compress",
    "count_parameters",
    "dense_parameters",
    "distill",
    "estimate_seconds",
    "freeze_other_than_low_rank",
    "low_rank_components",
    "prune",
    "prune_family",
    "select_layers",
    "stored_bytes",
    "structured_layers",
]
