"""Low-rank adaptation inside studies, in its plainest form."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from isogrid.errors import IsogridError


class LoRALinear(nn.Module):
    """``y = W x + b + (alpha / r) up(down(dropout(x)))``, W and b frozen (Hu et al. 2021).

    Args:
        base: the layer that is adapted.
        rank: r.
        alpha: scale, over r.
        dropout: of the adapter's input.
        generator: source of ``down``; ``up`` begins at zero.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, dropout: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        bound = (1 / base.in_features) ** 0.5  # Kaiming uniform with a = sqrt(5), as the reference implementation
        start = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        self.down, self.up = nn.Parameter(start), nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        adapted = functional.linear(functional.linear(self.dropout(x), self.down), self.up)
        return self.base(x) + self.scale * adapted


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    targets: Sequence[str],
    train: Sequence[str] = (),
    alpha: float | None = None,
    dropout: float = 0.1,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freeze a model and adapt its linear layers, in place.

    Args:
        model: changed in place.
        rank: of every adapter.
        targets: patterns of layer names.
        train: patterns of other parameters that stay trainable.
        alpha: scale; None is the rank.
        dropout: of the adapters' inputs.
        generator: source of the start.

    Returns:
        The names of the adapted layers.

    Raises:
        IsogridError: nothing matches, or the rank is below 1.
    """
    if rank < 1:
        raise IsogridError(f"LoRA: rank is {rank}; it is at least 1")
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatch.fnmatch(name, pattern) for pattern in targets)
    }
    if not chosen:
        raise IsogridError(f"LoRA: no linear layer matches {', '.join(targets)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in train))
    for name, layer in chosen.items():
        model.set_submodule(name, LoRALinear(layer, rank, rank if alpha is None else alpha, dropout, generator))
    return list(chosen)
