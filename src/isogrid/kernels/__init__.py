"""Fast products that formats share."""

from isogrid.kernels.bits import pack_codes, pack_mask, packed_bytes, unpack_codes, unpack_mask
from isogrid.kernels.blocked import (
    block_dense_product,
    coupled_stages,
    dense_product,
    low_rank_product,
    one_stage,
    pad_features,
    two_stage,
)
from isogrid.kernels.columns import added_to_chosen, in_order
from isogrid.kernels.derived import derived, derived_bytes, forget
from isogrid.kernels.native import takes as native_takes
from isogrid.kernels.native.build import cache_folder
from isogrid.kernels.sparse import scattered, sparse_product
from isogrid.kernels.trits import PACKINGS, pack_trits, row_bytes, trit_matrix, trit_product, unpack_trits

__all__ = [
    "PACKINGS",
    "added_to_chosen",
    "block_dense_product",
    "cache_folder",
    "coupled_stages",
    "dense_product",
    "derived",
    "derived_bytes",
    "forget",
    "in_order",
    "low_rank_product",
    "native_takes",
    "one_stage",
    "pack_codes",
    "pack_mask",
    "pack_trits",
    "packed_bytes",
    "pad_features",
    "row_bytes",
    "scattered",
    "sparse_product",
    "trit_matrix",
    "trit_product",
    "two_stage",
    "unpack_codes",
    "unpack_mask",
    "unpack_trits",
]
