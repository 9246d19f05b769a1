"""What a matrix can be: one file per format."""

from isogrid.formats.base import (
    Budget,
    Component,
    Cost,
    Factor,
    Factors,
    Format,
    Traits,
    as_format,
    check_factors,
    format_class,
    format_from_dict,
    new_factors,
    registered,
)
from isogrid.formats.block_tensor_train import BlockTensorTrain
from isogrid.formats.dense import Dense
from isogrid.formats.low_rank import LowRank
from isogrid.formats.low_rank_light import LowRankLight
from isogrid.formats.monarch import Monarch
from isogrid.formats.permuted import Permuted
from isogrid.formats.sum import Sum

__all__ = [
    "BlockTensorTrain",
    "Budget",
    "Component",
    "Cost",
    "Dense",
    "Factor",
    "Factors",
    "Format",
    "LowRank",
    "LowRankLight",
    "Monarch",
    "Permuted",
    "Sum",
    "Traits",
    "as_format",
    "check_factors",
    "format_class",
    "format_from_dict",
    "new_factors",
    "registered",
]
