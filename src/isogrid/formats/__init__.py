"""What a matrix can be: one file per format."""

from isogrid.formats.aliases import block_shuffle, rank_one_monarch
from isogrid.formats.armor import Armor
from isogrid.formats.base import Format
from isogrid.formats.blast import Blast
from isogrid.formats.block_dense import BlockDense
from isogrid.formats.block_diagonal import BlockDiagonal
from isogrid.formats.block_tensor_chain import BlockTensorChain
from isogrid.formats.block_tensor_train import BlockTensorTrain
from isogrid.formats.budget import Budget, Cost
from isogrid.formats.capped import Capped
from isogrid.formats.checks import check_factors
from isogrid.formats.circulant import Circulant
from isogrid.formats.dense import Dense
from isogrid.formats.dense_sparse import DenseSparse
from isogrid.formats.factors import Factor, Factors, new_factors
from isogrid.formats.kronecker import Kronecker
from isogrid.formats.low_rank import LowRank
from isogrid.formats.low_rank_light import LowRankLight
from isogrid.formats.monarch import Monarch
from isogrid.formats.permuted import Permuted
from isogrid.formats.product import Product
from isogrid.formats.quantized import Quantized
from isogrid.formats.sparse import SemiStructured, Sparse
from isogrid.formats.spelling import as_format, format_class, format_from_dict, registered
from isogrid.formats.start import Component
from isogrid.formats.stored import Stored
from isogrid.formats.sum import Sum
from isogrid.formats.tensor_train import TensorTrain
from isogrid.formats.traits import Traits
from isogrid.formats.trit_planes import TritPlanes

__all__ = [
    "Armor",
    "Blast",
    "BlockDense",
    "BlockDiagonal",
    "BlockTensorChain",
    "BlockTensorTrain",
    "Budget",
    "Capped",
    "Circulant",
    "Component",
    "Cost",
    "Dense",
    "DenseSparse",
    "Factor",
    "Factors",
    "Format",
    "Kronecker",
    "LowRank",
    "LowRankLight",
    "Monarch",
    "Permuted",
    "Product",
    "Quantized",
    "SemiStructured",
    "Sparse",
    "Stored",
    "Sum",
    "TensorTrain",
    "Traits",
    "TritPlanes",
    "as_format",
    "block_shuffle",
    "check_factors",
    "format_class",
    "format_from_dict",
    "new_factors",
    "rank_one_monarch",
    "registered",
]
