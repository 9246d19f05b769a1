"""The published methods, each as the choices of `ProjectedAdamW` that reproduce it.

Each takes parameters, named parameters or groups, as `torch.optim` does; groups without a ``rank`` of their own get the
preset's, groups with ``rank=None`` plain AdamW in the method's conventions. Any option of `ProjectedAdamW` may be given
on top. The sources fix ``min(rank, rows, columns)`` where a matrix is smaller than the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from isogrid.errors import IsogridError
from isogrid.fitting.ranks import FixedRank, FractionRank, RankRule, as_rank_rule
from isogrid.optim.projected_adamw import ProjectedAdamW

Params = Iterable[Any]
Rank = RankRule | int | float


def clipped(rank: Rank) -> RankRule:
    """A number as ``min(rank, rows, columns)`` of each matrix; any other rule as it is."""
    return FixedRank(rank, clip=True) if isinstance(rank, int) else as_rank_rule(rank)


def default(params: Params, lr: float = 1e-3, *, rank: Rank = 16, **options: Any) -> ProjectedAdamW:
    """Isogrid's own method: `ProjectedAdamW`'s defaults, the rank cut to the short side where that is less."""
    return ProjectedAdamW(params, lr, clipped(rank), **options)


def rsvd_adam(
    params: Params,
    lr: float = 1e-3,
    *,
    rank_fraction: float = 0.25,
    refresh: int = 200,
    svt: bool = False,
    **options: Any,
) -> ProjectedAdamW:
    """rSVDAdam: randomised SVD of the rows, always on the left, moments kept (Bal, Hariharane, Gobinathan 2025).

    ``svt=True`` is the source's "SVT" variant, which only widens the sketch to ``2 r + 4`` columns and thresholds
    nothing; for a genuine threshold give ``rank=ThresholdRank(…)``.

    Args:
        params: see the module.
        lr: learning rate.
        rank_fraction: ``r = max(1, floor(rank_fraction · min(rows, columns)))``.
        refresh: the source's ``proj_interval``.
        svt: double the sketch.
        options: any of `ProjectedAdamW`; ``decoupled=True`` is the source's ``decoupled_weight_decay``.
    """
    chosen = {
        "rank": FractionRank(rank_fraction),
        "projector": "randomized",
        "side": "left",
        "refresh": refresh,
        "oversample": 4,
        "power_steps": 1,
        "transition": "keep",
        "residual": "none",
        "decoupled": False,
        "sketch_factor": 2 if svt else 1,
    }
    return ProjectedAdamW(params, lr, **{**chosen, **options})


def galore(
    params: Params, lr: float = 1e-3, *, rank: Rank = 128, refresh: int = 200, scale: float = 0.25, **options: Any
) -> ProjectedAdamW:
    """GaLore: exact SVD of the short side, moments kept (Zhao et al. 2024, algorithm 2), in its code's conventions.

    Args:
        params: see the module.
        lr: learning rate.
        rank: of the subspace.
        refresh: ``update_proj_gap``.
        scale: α.
        options: ``style="torch"`` is the paper's form.
    """
    chosen = {
        "rank": clipped(rank),
        "projector": "svd",
        "refresh": refresh,
        "scale": scale,
        "transition": "keep",
        "residual": "none",
        "eps": 1e-6,
        "style": "hf",
    }
    return ProjectedAdamW(params, lr, **{**chosen, **options})


def q_galore(
    params: Params, lr: float = 1e-3, *, rank: Rank = 128, refresh: int = 200, scale: float = 0.25, **options: Any
) -> ProjectedAdamW:
    """Q-GaLore: GaLore with a 4-bit basis, 8-bit moments, and a gap that doubles while the subspace stands.

    Zhang et al. 2024. The cosine between leading directions is taken without its sign. bfloat16 weights are rounded
    stochastically.

    Args:
        params: see the module.
        lr: learning rate.
        rank: of the subspace.
        refresh: the first gap.
        scale: α.
        options: any of `ProjectedAdamW`; ``projector_bits=8`` for an 8-bit basis.
    """
    chosen = {"state": "8bit", "projector_bits": 4, "adaptive": {}, "stochastic_rounding": True}
    return galore(params, lr, rank=rank, refresh=refresh, scale=scale, **{**chosen, **options})


def ldadam(
    params: Params,
    lr: float = 1e-3,
    *,
    rank: Rank = 16,
    tracking: float = 0.908,
    error_feedback: bool = True,
    **options: Any,
) -> ProjectedAdamW:
    """LDAdam: one power iteration a step, moments re-projected, error feedback (Robert et al. 2025, algorithm 1).

    The carried error is state of its own and never stands in ``.grad``, so clipping does not see it.

    Args:
        params: see the module.
        lr: learning rate.
        rank: of the subspace.
        tracking: ρ.
        error_feedback: carry what the subspace misses, at the cost of one gradient's memory.
        options: any of `ProjectedAdamW`.
    """
    chosen = {
        "rank": clipped(rank),
        "betas": (0.908, 0.99),
        "eps": 1e-8,
        "projector": "power",
        "power_steps": 1,
        "tracking": tracking,
        "refresh": 1,
        "transition": "reproject",
        "residual": "error_feedback" if error_feedback else "none",
    }
    return ProjectedAdamW(params, lr, **{**chosen, **options})


def fira(
    params: Params, lr: float = 1e-3, *, rank: Rank = 128, refresh: int = 200, scale: float = 0.25, **options: Any
) -> ProjectedAdamW:
    """Fira: GaLore, and the residual scaled as Adam scales the subspace, its growth limited (Chen et al. 2024, alg. 1).

    Args:
        params: see the module.
        lr: learning rate.
        rank: of the subspace.
        refresh: steps between bases.
        scale: α; where it is not 1, ``residual_of_scaled=True`` is the published code instead of the paper.
        options: any of `ProjectedAdamW`.
    """
    return galore(
        params, lr, rank=rank, refresh=refresh, scale=scale, **{"residual": "fira", "limiter": 1.01, **options}
    )


def apollo(
    params: Params, lr: float = 1e-2, *, rank: Rank = 256, refresh: int = 200, scale: float = 1.0, **options: Any
) -> ProjectedAdamW:
    """APOLLO: a random projection only tells how Adam would scale each channel (Zhu et al. 2025, algorithm 1).

    The projection is drawn again from its seed at every step and takes no memory.

    Args:
        params: see the module.
        lr: learning rate.
        rank: of the projection.
        refresh: steps between draws.
        scale: its root multiplies the update.
        options: ``scale_first=True`` is the source's ``scale_front``.
    """
    chosen = {
        "rank": clipped(rank),
        "projector": "random",
        "refresh": refresh,
        "scale": scale,
        "transition": "keep",
        "residual": "apollo_channel",
        "limiter": 1.01,
        "eps": 1e-6,
        "style": "hf",
    }
    return ProjectedAdamW(params, lr, **{**chosen, **options})


def apollo_mini(params: Params, lr: float = 1e-2, *, scale: float = 128.0, **options: Any) -> ProjectedAdamW:
    """APOLLO-Mini: rank 1 and one factor for the whole matrix (Zhu et al. 2025).

    Args:
        params: see the module.
        lr: learning rate.
        scale: its root multiplies the update.
        options: any of `ProjectedAdamW`.
    """
    return apollo(params, lr, **{"rank": 1, "scale": scale, "residual": "apollo_tensor", **options})


def golore(
    params: Params, lr: float = 1e-3, *, rank: Rank = 128, refresh: int = 200, scale: float = 0.25, **options: Any
) -> ProjectedAdamW:
    """GoLore: GaLore with a random orthonormal basis, moments re-projected (He et al. 2024).

    Args:
        params: see the module.
        lr: learning rate.
        rank: of the subspace.
        refresh: steps between draws.
        scale: α.
        options: any of `ProjectedAdamW`.
    """
    chosen = {"projector": "random_orthonormal", "transition": "reproject"}
    return galore(params, lr, rank=rank, refresh=refresh, scale=scale, **{**chosen, **options})


def top_r(params: Params, lr: float = 1e-3, *, fraction: float = 0.1, **options: Any) -> ProjectedAdamW:
    """Top-R: the largest entries of each gradient, then AdamW on them; moments stay dense, no memory is saved.

    An ablation of Bal, Hariharane, Gobinathan 2025: exactly ``floor(fraction · numel)`` entries a tensor.

    Args:
        params: see the module.
        lr: learning rate.
        fraction: share of the entries.
        options: any of `ProjectedAdamW`.
    """
    return ProjectedAdamW(
        params, lr, **{"rank": FractionRank(fraction), "projector": "top", "weight_decay": 0.01, **options}
    )


PRESETS: dict[str, Callable[..., ProjectedAdamW]] = {
    "default": default,
    "rsvd_adam": rsvd_adam,
    "galore": galore,
    "q_galore": q_galore,
    "ldadam": ldadam,
    "fira": fira,
    "apollo": apollo,
    "apollo_mini": apollo_mini,
    "golore": golore,
    "top_r": top_r,
}


def preset(name: str) -> Callable[..., ProjectedAdamW]:
    """A preset by name.

    Raises:
        IsogridError: there is none of that name.
    """
    if name not in PRESETS:
        raise IsogridError(f"optimizer {name!r} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]
