"""A made-up format that says only what a format must say: what jobs do for a stranger's format is tested on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from isogrid.formats.base import Format
from isogrid.formats.factors import Factor
from isogrid.kernels import pad_features


@dataclass(frozen=True)
class ShuffledGroups(Format):
    """Three grouped linear maps with a channel shuffle after the first and the second, as in ShuffleNet.

    Attributes:
        width: hidden features of each group.
        groups: number of groups.
    """

    width: int = 1
    groups: int = 2

    name: ClassVar[str] = "toy_shuffled_groups"
    size_field: ClassVar[str] = "width"

    def factors(self, out_features: int, in_features: int) -> dict[str, Factor]:
        """``first (groups, width, fan_in)``, ``middle (groups, width, width)``, ``last (groups, fan_out, width)``."""
        return {
            "first": Factor((self.groups, self.width, -(-in_features // self.groups))),
            "middle": Factor((self.groups, self.width, self.width)),
            "last": Factor((self.groups, -(-out_features // self.groups), self.width)),
        }

    def multiply(self, factors: Mapping[str, Tensor], x: Tensor, out_features: int) -> Tensor:
        """Grouped product, shuffle, grouped product, shuffle, grouped product."""
        groups, width, in_group = factors["first"].shape
        hidden = pad_features(x, groups * in_group).reshape(-1, groups, in_group).transpose(0, 1)  # (groups, rows, ·)
        for stage in ("first", "middle"):
            hidden = torch.bmm(hidden, factors[stage].mT)  # (groups, rows, width)
            hidden = hidden.permute(1, 2, 0).reshape(-1, groups, width).transpose(0, 1)  # the channel shuffle
        y = torch.bmm(hidden, factors["last"].mT).transpose(0, 1)  # (rows, groups, out / groups)
        return y.reshape(*x.shape[:-1], y.shape[1] * y.shape[2])[..., :out_features]
