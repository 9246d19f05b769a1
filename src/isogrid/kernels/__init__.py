"""Fast products that formats share."""

from isogrid.kernels.blocked import coupled_stages, one_stage, pad_features, two_stage
from isogrid.kernels.derived import derived, derived_bytes, forget
from isogrid.kernels.native import takes as native_takes

__all__ = [
    "coupled_stages",
    "derived",
    "derived_bytes",
    "forget",
    "native_takes",
    "one_stage",
    "pad_features",
    "two_stage",
]
