"""The methods that the fine-tuning study compares: what each changes in the model, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from isogrid.errors import IsogridError
from isogrid.models import add_lora
from isogrid.optim import FixedRank, FractionRank, ProjectedAdamW, rsvd_adam, top_r
from isogrid.training import factorize_trainable, truncate_factors
from isogrid.training.factored import factored_layers, trainable

# Query, key and value of BERT and of DistilBERT, by the ends of their names.
ATTENTION = ("*.query", "*.key", "*.value", "*.q_lin", "*.k_lin", "*.v_lin")
HEAD = ("pre_classifier.*", "classifier.*")
DECAY = 0.01
# The source's shares of the short side, listed under the rank they stand beside in its table.
FRACTIONS = {4: 0.01, 8: 0.05, 16: 0.1, 64: 0.25, 128: 0.5}
# What other ranks are a share of.
WHOLE = 256
TRUNCATE_EVERY = 50


@dataclass(frozen=True)
class Setting:
    """What a method is told.

    Attributes:
        rank: of subspaces, adapters or factors.
        lr: learning rate.
        refresh: steps between bases.
        seed: of everything drawn.
    """

    rank: int
    lr: float
    refresh: int
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """A fresh source of randomness for the start."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Method:
    """One row of the study.

    Attributes:
        label: its name in tables.
        begin: changes the model in place and makes the optimizer.
        ranked: whether the rank matters.
        after_step: called with model, optimizer, setting and the number of completed steps.
    """

    label: str
    begin: Callable[[nn.Module, Setting], Optimizer]
    ranked: bool = True
    after_step: Callable[[nn.Module, Optimizer, Setting, int], None] = lambda *_: None


def targets_of(model: nn.Module) -> list[str]:
    """The patterns of `ATTENTION` that this model has layers for."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [pattern for pattern in ATTENTION if any(name.endswith(pattern[1:]) for name in names)]


def _adamw(model: nn.Module, setting: Setting) -> Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in trainable(model)], setting.lr, weight_decay=DECAY)


def _lora(model: nn.Module, setting: Setting) -> Optimizer:
    add_lora(model, setting.rank, targets=targets_of(model), train=HEAD, generator=setting.generator)
    return _adamw(model, setting)


def _lora_top_r(model: nn.Module, setting: Setting) -> Optimizer:
    add_lora(model, setting.rank, targets=targets_of(model), train=HEAD, generator=setting.generator)
    # Vectors of a few numbers have no largest tenth; the head's two biases train whole.
    named = trainable(model)
    groups = [
        {"params": [entry for entry in named if entry[1].numel() >= 10]},
        {
            "params": [(name, parameter) for name, parameter in named if parameter.numel() < 10],
            "rank": FractionRank(1.0),
        },
    ]
    return top_r(groups, setting.lr, fraction=0.1, weight_decay=DECAY)


def _common(setting: Setting) -> dict[str, Any]:
    return {"weight_decay": DECAY, "decoupled": True, "refresh": setting.refresh, "seed": setting.seed}


def _rsvd_adam(model: nn.Module, setting: Setting) -> Optimizer:
    rank = FixedRank(setting.rank, clip=True)
    return rsvd_adam(model.named_parameters(), setting.lr, rank=rank, **_common(setting))


def _svt_fixed(model: nn.Module, setting: Setting) -> Optimizer:
    rank = FixedRank(setting.rank, clip=True)
    return rsvd_adam(model.named_parameters(), setting.lr, rank=rank, svt=True, **_common(setting))


def share_of(rank: int) -> float:
    """The share of the short side that stands beside a rank.

    Raises:
        IsogridError: it would be more than all of it.
    """
    if rank > WHOLE:
        raise IsogridError(
            f"--rank {rank} is beyond svt_fraction's share of the short side, rank / {WHOLE}; "
            f"use at most {WHOLE}, or other methods"
        )
    return FRACTIONS.get(rank, rank / WHOLE)


def _svt_fraction(model: nn.Module, setting: Setting) -> Optimizer:
    share = share_of(setting.rank)
    return rsvd_adam(model.named_parameters(), setting.lr, rank_fraction=share, svt=True, **_common(setting))


def _factored(model: nn.Module, setting: Setting) -> Optimizer:
    factorize_trainable(model, setting.rank, targets=targets_of(model), train=HEAD)
    return _adamw(model, setting)


def _truncate(model: nn.Module, optimizer: Optimizer, setting: Setting, step: int) -> None:
    """To half the rank, once: the factors stay small afterwards, where the source fills up with zeros again."""
    smaller = max(1, setting.rank // 2)
    if step % TRUNCATE_EVERY == 0 and any(layer.rank > smaller for layer in factored_layers(model).values()):
        truncate_factors(model, smaller, optimizer)


def _default(model: nn.Module, setting: Setting) -> Optimizer:
    rank = FixedRank(setting.rank, clip=True)
    return ProjectedAdamW(model.named_parameters(), setting.lr, rank, **_common(setting))


METHODS: dict[str, Method] = {
    "adam": Method("AdamW, all parameters", _adamw, ranked=False),
    "lora": Method("LoRA", _lora),
    "lora_top_r": Method("LoRA, largest tenth of gradients", _lora_top_r),
    "rsvd_adam": Method("rSVDAdam", _rsvd_adam),
    "svt_fixed": Method("rSVDAdam, SVT, fixed rank", _svt_fixed),
    "svt_fraction": Method("rSVDAdam, SVT, fraction", _svt_fraction),
    "factored": Method("Factors", _factored),
    "factored_svt": Method("Factors, truncated to half", _factored, after_step=_truncate),
    "default": Method("Isogrid's default", _default),
}
