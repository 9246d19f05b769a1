"""What formats of packed codes and masks share: fewer bytes, not fewer operations."""

from __future__ import annotations

from abc import ABC

import torch

from isogrid.formats.base import Format
from isogrid.formats.budget import Cost
from isogrid.formats.start import Component


class Coded(Format, ABC):
    """A matrix that is stored in codes or behind a mask, and multiplied as a dense one."""

    def components(self, out_features: int, in_features: int) -> list[Component]:
        """None: there is no dense stage."""
        return []

    def cost(self, out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Cost:
        """As stored, codes and masks included; multiply-adds of the dense product."""
        counted = super().cost(out_features, in_features, dtype)
        return Cost(counted.parameters, out_features * in_features, counted.bits)
