"""Fast products that formats share."""

from isogrid.kernels.blocked import coupled_stages, dense_product, low_rank_product, one_stage, pad_features, two_stage
from isogrid.kernels.derived import derived, derived_bytes, forget
from isogrid.kernels.native import takes as native_takes
from isogrid.kernels.native.build import cache_folder

__all__ = [
    "cache_folder",
    "coupled_stages",
    "dense_product",
    "derived",
    "derived_bytes",
    "forget",
    "low_rank_product",
    "native_takes",
    "one_stage",
    "pad_features",
    "two_stage",
]
