"""Optimizers whose state is small: AdamW in subspaces of the gradient."""

from isogrid.fitting.ranks import EnergyRank, FixedRank, FractionRank, ThresholdRank
from isogrid.optim.accounting import (
    activation_bytes,
    memory_breakdown,
    predicted_activation_bytes,
    predicted_state_bytes,
    projection_flops,
    refresh_flops,
    state_bytes,
)
from isogrid.optim.cuts import follow_cuts
from isogrid.optim.groups import TrainerFactory, make_optimizer, projected_groups
from isogrid.optim.presets import (
    PRESETS,
    apollo,
    apollo_mini,
    default,
    fira,
    galore,
    golore,
    ldadam,
    preset,
    q_galore,
    rsvd_adam,
    top_r,
)
from isogrid.optim.projected_adamw import ProjectedAdamW

__all__ = [
    "PRESETS",
    "EnergyRank",
    "FixedRank",
    "FractionRank",
    "ProjectedAdamW",
    "ThresholdRank",
    "TrainerFactory",
    "activation_bytes",
    "apollo",
    "apollo_mini",
    "default",
    "fira",
    "follow_cuts",
    "galore",
    "golore",
    "ldadam",
    "make_optimizer",
    "memory_breakdown",
    "predicted_activation_bytes",
    "predicted_state_bytes",
    "preset",
    "projected_groups",
    "projection_flops",
    "q_galore",
    "refresh_flops",
    "rsvd_adam",
    "state_bytes",
    "top_r",
]
