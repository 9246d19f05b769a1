"""Which parameters of a model are projected, and the optimizer as training loops want to be given it."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.fitting.ranks import RankRule
from isogrid.linear import StructuredLinear
from isogrid.optim.presets import clipped, preset
from isogrid.optim.projected_adamw import ProjectedAdamW

# Heads read few classes out of many features, and tokens that were not seen yet have no place in a left basis.
HEADS = ("classifier", "score", "embed_out")
# Classes, of rooms that this one can't see, whose parameters are two thin factors.
THIN = ("FactoredLinear", "LoRALinear")


def projected_groups(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    weight_decay: float = 0.0,
    decay_all: bool = False,
    rank: RankRule | int | float | None = None,
) -> list[dict[str, Any]]:
    """Three groups of named parameters: projected matrices, other matrices, and vectors without decay.

    Projected are the weights of layers inside the model: linear, convolution, and any other parameter of two
    dimensions or more that is no embedding, no head (by name: ``classifier``, ``score``, ``embed_out``, what ends in
    ``head``) and no factor. Factors are small already: a `StructuredLinear`'s, which may be stacks of blocks, never are
    projected; those of factored layers and adapters are where their short side is more than twice the rank.

    Args:
        model: parameters that need no gradient are left out.
        targets: patterns of parameter names to project instead, as ``"*.q_proj.weight"``.
        skip: patterns of names not to project.
        weight_decay: of matrices.
        decay_all: of vectors too.
        rank: that the optimizer will have; None projects no factors.

    Raises:
        IsogridError: a pattern of ``targets`` matches no matrix that can be trained.
    """
    kept_whole: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag | StructuredLinear):
            kept_whole |= {id(parameter) for parameter in module.parameters(recurse=False)}
        elif type(module).__name__ in THIN:
            kept_whole |= {id(one) for one in module.parameters(recurse=False) if not _gains(one, rank)}
    groups: list[list[tuple[str, Any]]] = [[], [], []]
    matched: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if targets is not None:
            hits = {pattern for pattern in targets if fnmatch.fnmatch(name, pattern)} if parameter.ndim >= 2 else set()
            matched |= hits
            wanted = bool(hits)
        else:
            head = any(part in HEADS or part.endswith("head") for part in name.lower().split("."))
            adapter = any(part.startswith("lora_") for part in name.split("."))
            thin = id(parameter) in kept_whole or (adapter and not _gains(parameter, rank))
            wanted = parameter.ndim >= 2 and not thin and not head
        wanted = wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in skip)
        groups[0 if wanted else 1 if parameter.ndim >= 2 else 2].append((name, parameter))
    if targets is not None and (lost := [pattern for pattern in targets if pattern not in matched]):
        raise IsogridError(
            f"target {lost[0]!r} matches no trainable matrix; "
            f"names are like {next(iter(model.named_parameters()))[0]!r}"
        )
    decays = (weight_decay, weight_decay, weight_decay if decay_all else 0.0)
    plain: tuple[dict[str, None], ...] = ({}, {"rank": None}, {"rank": None})
    return [
        {"params": parameters, "weight_decay": decay, **extra}
        for parameters, decay, extra in zip(groups, decays, plain, strict=True)
        if parameters
    ]


def _gains(factor: Tensor, rank: RankRule | int | float | None) -> bool:
    """Whether a thin factor is projected: at a short side of twice the rank, a basis costs what the moments save."""
    if rank is None or factor.ndim != 2:
        return False
    return min(factor.shape) > 2 * clipped(rank).most(*factor.shape)


def make_optimizer(
    model: nn.Module,
    method: str = "default",
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    **options: Any,
) -> ProjectedAdamW:
    """A preset over the groups of `projected_groups`.

    Args:
        model: the model to train.
        method: a preset's name.
        lr: learning rate.
        weight_decay: of matrices.
        targets: patterns of parameter names to project.
        skip: patterns of names not to project.
        options: of the preset: ``rank``, ``refresh``, …

    Raises:
        IsogridError: an unknown preset, or one of its errors.
    """
    groups = projected_groups(model, targets=targets, skip=skip, weight_decay=weight_decay, rank=options.get("rank"))
    return preset(method)(groups, lr, **options)


class TrainerFactory:
    """What ``transformers.Trainer(optimizer_cls_and_kwargs=(TrainerFactory, {...}))`` calls: groups made by name.

    The dict holds ``lr`` and what else `make_optimizer` takes. Giving `ProjectedAdamW` itself works too; Trainer then
    makes its own two groups, and embeddings and heads are projected like every matrix.
    """

    def __call__(self, model: nn.Module, **options: Any) -> ProjectedAdamW:
        """Make the optimizer of a model."""
        return make_optimizer(model, **options)
