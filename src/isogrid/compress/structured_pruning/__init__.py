"""Structured pruning: smaller dense layers, as many as make the model as fast as it is asked to be (ZipLM)."""

from isogrid.compress.structured_pruning.orders import CRITERIA, How
from isogrid.compress.structured_pruning.prune import prune, prune_family
from isogrid.compress.structured_pruning.pruner import ALLOCATIONS, Pruner
from isogrid.compress.structured_pruning.search import Found
from isogrid.compress.structured_pruning.summary import ModuleReport, PruningReport
from isogrid.compress.structured_pruning.times import SavedTimes

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "Found",
    "How",
    "ModuleReport",
    "Pruner",
    "PruningReport",
    "SavedTimes",
    "prune",
    "prune_family",
]
