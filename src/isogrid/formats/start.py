"""Starts for training from scratch, which follow from the dense stages of a format's product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isogrid.errors import IsogridError
from isogrid.fitting import widened
from isogrid.formats.factors import Factor


@dataclass(frozen=True)
class Component:
    """One dense stage of a product: what initialisation and learning rates need to know (Qiu et al. 2024, section 3).

    Attributes:
        factor: name of the factor that holds it.
        fan_in: inputs of one of its blocks.
        fan_out: outputs of one of its blocks.
        outputs: outputs of all its blocks together.
    """

    factor: str
    fan_in: int
    fan_out: int
    outputs: int


def gaussian_start(
    factors: Mapping[str, Tensor],
    specs: Mapping[str, Factor],
    components: Sequence[Component],
    generator: torch.Generator | None,
) -> None:
    """`Format.initialize`, in place: weights of standard deviation ``sqrt(min(fan_in, fan_out)) / fan_in``."""
    stages = {stage.factor: stage for stage in components}
    for name, factor in specs.items():
        value = factors[name]
        if factor.role == "index":
            value.copy_(torch.arange(value.numel(), device=value.device).view(value.shape))
        elif factor.role == "gain":
            value.fill_(1)
        elif factor.role == "weight":
            stage = stages.get(name)
            fan_in, fan_out = (stage.fan_in, stage.fan_out) if stage else (factor.numel, factor.numel)
            std = math.sqrt(max(min(fan_in, fan_out), 1)) / max(fan_in, 1)
            normal_(value, std, generator)
        else:
            value.zero_()


def orthonormal_start(
    label: str, factors: Mapping[str, Tensor], specs: Mapping[str, Factor], components: Sequence[Component]
) -> None:
    """`Format.orthonormalize`, in place: every block of every weight factor becomes its polar factor.

    Raises:
        IsogridError: a weight factor is no stack of blocks; nothing is changed then.
    """
    stages = {stage.factor: stage for stage in components}
    weights = [name for name, spec in specs.items() if spec.role == "weight" and spec.numel]
    for name in weights:
        sides = {} if name not in stages else {stages[name].fan_in, stages[name].fan_out}
        # More axes may end in sides of the right lengths that are not those of the block.
        if set(specs[name].shape[-2:]) != sides or len(specs[name].shape) not in (2, 3):
            raise IsogridError(
                f"{label}: factor {name!r} of shape {specs[name].shape} is no stack of blocks, so it has no "
                "orthonormal start; take the default start"
            )
    for name in weights:
        orthonormalize_(factors[name])


def normal_(value: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with Gaussian numbers drawn in float32 where the generator lives: same seed, same numbers on any device."""
    device = generator.device if generator is not None else "cpu"
    drawn = torch.randn(value.shape, generator=generator, device=device, dtype=torch.float32)
    value.copy_(drawn * std)


def orthonormalize_(blocks: Tensor) -> None:
    """Each matrix of a stack ``(…, rows, columns)`` becomes its polar factor, in place; solved in float64."""
    u, _, vh = torch.linalg.svd(widened(blocks), full_matrices=False)
    blocks.copy_(u @ vh)
