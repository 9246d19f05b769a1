"""Text as characters, for models that are trained from nothing in minutes."""

from __future__ import annotations

import torch
from torch import Tensor

from isogrid.models.gpt import GPT


def characters(text: str) -> tuple[Tensor, int]:
    """(int64 indices of the characters, how many different ones there are), in the order of their code points."""
    alphabet = sorted(set(text))
    places = {character: place for place, character in enumerate(alphabet)}
    return torch.tensor([places[character] for character in text]), len(alphabet)


def random_windows(ids: Tensor, length: int, batch: int, generator: torch.Generator) -> Tensor:
    """``(batch, length + 1)`` windows at random places."""
    starts = torch.randint(len(ids) - length - 1, (batch,), generator=generator)
    return torch.stack([ids[start : start + length + 1] for start in starts.tolist()])


@torch.no_grad()
def validation_loss(model: GPT, ids: Tensor, windows: int = 64, batch: int = 16) -> float:
    """Mean loss in nats over windows spread evenly over a text."""
    length = model.config.length
    starts = torch.linspace(0, len(ids) - length - 1, windows).long().tolist()
    every = torch.stack([ids[start : start + length + 1] for start in starts])
    was_training = model.training
    model.eval()
    losses = [float(model.loss(part)) * len(part) for part in every.split(batch)]
    model.train(was_training)
    return sum(losses) / windows
