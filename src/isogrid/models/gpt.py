"""A GPT as small as it may be: learned positions, pre-norm blocks, separate q, k, v matrices, tied embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from isogrid.errors import IsogridError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Attributes:
        vocabulary: number of tokens.
        length: the longest sequence.
        width: features of a token.
        layers: number of blocks.
        heads: of attention; divides the width.
    """

    vocabulary: int
    length: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise IsogridError(f"GPT: width {self.width} is not divisible by {self.heads} heads")


class Block(nn.Module):
    """Attention, then an MLP of four times the width, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, width)`` to the same shape."""
        batch, length, width = x.shape
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )  # (batch, heads, length, head width)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A causal language model. Weights start as N(0, 0.02²), those before a residual sum smaller by ``sqrt(2 layers)``.

    Args:
        config: sizes.
        generator: source of the start.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim < 2:
                    continue
                last = name.endswith(("o.weight", "down.weight"))
                scale = 0.02 / (2 * config.layers) ** 0.5 if last else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            for module in self.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length, vocabulary)`` of the next token for int64 ``(batch, length)``."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats of windows ``(batch, length + 1)``: each token from those before it."""
        logits = self(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
