"""The choices of a parameter group: what each may be, and which don't go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isogrid.errors import IsogridError
from isogrid.fitting.ranks import FractionRank, as_rank_rule, spelled
from isogrid.optim.subspaces import PROJECTORS, SIDES

TRANSITIONS = ("keep", "reset", "reproject")
RESIDUALS = ("none", "normalized", "fira", "error_feedback", "apollo_channel", "apollo_tensor")
STATES = ("float32", "bfloat16", "8bit")
STYLES = ("torch", "hf")
CORES = ("adam", "sgd")
CHOICES: dict[str, tuple[str, ...]] = {
    "projector": PROJECTORS,
    "side": SIDES,
    "transition": TRANSITIONS,
    "residual": RESIDUALS,
    "state": STATES,
    "style": STYLES,
    "core": CORES,
}
ADAPTIVE = {"threshold": 0.4, "factor": 2, "queue": 5}


def checked(group: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The group's options with the rank rule spelled out as plain values.

    Args:
        group: all options.
        place: names the group in errors.

    Raises:
        IsogridError: a value out of range, or two choices that contradict each other.
    """

    def require(met: bool, key: str, wanted: str) -> None:
        if not met:
            raise IsogridError(f"{place}: {key} is {group[key]!r}; {wanted}")

    for key, known in CHOICES.items():
        require(group[key] in known, key, f"it is one of {', '.join(known)}")
    require(float(group["lr"]) >= 0 and math.isfinite(float(group["lr"])), "lr", "it is a finite number, at least 0")
    require(group["eps"] >= 0, "eps", "it is at least 0")
    require(group["weight_decay"] >= 0, "weight_decay", "it is at least 0")
    require(
        len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"]), "betas", "two numbers in [0, 1)"
    )
    require(isinstance(group["refresh"], int) and group["refresh"] >= 1, "refresh", "a number of steps, at least 1")
    require(isinstance(group["sketch_factor"], int) and group["sketch_factor"] >= 1, "sketch_factor", "at least 1")
    for key in ("oversample", "power_steps"):
        require(isinstance(group[key], int) and group[key] >= 0, key, "a whole number, at least 0")
    require(0 <= group["tracking"] < 1, "tracking", "it lies in [0, 1)")
    require(group["scale"] > 0, "scale", "it is above 0")
    require(group["limiter"] is None or group["limiter"] >= 1, "limiter", "a growth factor of at least 1, or None")
    require(group["projector_bits"] in (None, 4, 8), "projector_bits", "it is None, 4 or 8")
    options = dict(group)
    if group["adaptive"] is not None:
        require(
            isinstance(group["adaptive"], dict) and set(group["adaptive"]) <= set(ADAPTIVE),
            "adaptive",
            f"a dict with some of {', '.join(ADAPTIVE)}, or None",
        )
        options["adaptive"] = ADAPTIVE | group["adaptive"]
    if group["rank"] is not None:
        try:
            rule = as_rank_rule(group["rank"])
        except IsogridError as error:
            raise IsogridError(f"{place}: {error}") from None
        options["rank"] = spelled(rule)
        require(
            group["projector"] != "top" or isinstance(rule, FractionRank),
            "rank",
            "the projector 'top' keeps a fraction of the entries: FractionRank(0.1)",
        )
    gaussian, residual = group["projector"] == "random", group["residual"]
    require(
        not gaussian or residual in ("none", "apollo_channel", "apollo_tensor"),
        "residual",
        "the Gaussian basis of projector 'random' is not orthonormal; take 'random_orthonormal' with a residual",
    )
    require(group["correct_bias"] or group["style"] == "hf", "correct_bias", "only the style 'hf' may go without it")
    require(group["side"] != "both" or residual == "none", "residual", "side 'both' goes with residual 'none'")
    require(
        group["core"] == "adam" or residual in ("none", "error_feedback"),
        "residual",
        "core 'sgd' has no moments for it",
    )
    require(group["projector"] != "power" or group["side"] != "both", "side", "the projector 'power' tracks one side")
    require(
        not (gaussian and group["projector_bits"]), "projector_bits", "the projector 'random' is drawn anew, not stored"
    )
    return options
