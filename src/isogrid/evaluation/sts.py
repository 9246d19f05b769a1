"""How well a sentence encoder ranks pairs of sentences by likeness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.evaluation.mode import device_of, evaluating


class Pairs(Protocol):
    """Pairs of sentences with scores, such as `isogrid.data.SentencePairs`."""

    @property
    def first(self) -> Sequence[str]:
        """The first sentences."""

    @property
    def second(self) -> Sequence[str]:
        """The second sentences."""

    @property
    def scores(self) -> Tensor:
        """How alike they are, ``(pairs,)``."""


def sts_spearman(model: nn.Module, tokenizer: Any, pairs: Pairs, *, batch: int = 64, max_length: int = 128) -> float:
    """Spearman's correlation of the cosines between sentence embeddings with the scores people gave.

    Args:
        model: an encoder; see `embed_sentences`.
        tokenizer: its transformers tokenizer.
        pairs: sentences and scores, two pairs at least.
        batch: sentences in a forward pass.
        max_length: tokens kept of a sentence.

    Returns:
        -1 to 1; NaN where the model gives NaN or the same cosine for all.

    Raises:
        IsogridError: fewer than two pairs, or a batch below one.
    """
    if len(pairs.scores) < 2:
        raise IsogridError(f"sts_spearman: a correlation takes two pairs at least, got {len(pairs.scores)}")
    both = [*pairs.first, *pairs.second]
    first, second = embed_sentences(model, tokenizer, both, batch=batch, max_length=max_length).chunk(2)
    return spearman((first * second).sum(dim=1), pairs.scores)


def embed_sentences(
    model: nn.Module, tokenizer: Any, sentences: Sequence[str], *, batch: int = 64, max_length: int = 128
) -> Tensor:
    """The mean of a sentence's last hidden states over its real tokens, brought to length 1 (Reimers & Gurevych 2019).

    Args:
        model: gives ``.last_hidden_state`` ``(batch, tokens, hidden)``; left in the mode it was in.
        tokenizer: its transformers tokenizer.
        sentences: any number but zero; a repeated one is computed once.
        batch: sentences in a forward pass.
        max_length: tokens kept of a sentence.

    Returns:
        float32 on the CPU, ``(sentences, hidden)``.
    """
    if batch < 1 or not sentences:
        raise IsogridError(f"embed_sentences: {len(sentences)} sentences in batches of {batch}; both are 1 or more")
    # Sentences of like length share a batch, so that few of its places are padding.
    unique = sorted(dict.fromkeys(sentences), key=len)
    device = device_of(model)
    rows = []
    with evaluating(model):
        for start in range(0, len(unique), batch):
            tokens = tokenizer(
                unique[start : start + batch], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(device)
            states = model(**tokens).last_hidden_state.float()
            real = tokens["attention_mask"].unsqueeze(-1).float()  # (batch, tokens, 1)
            mean = (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
            rows.append(nn.functional.normalize(mean, dim=1).cpu())
    place = {sentence: row for row, sentence in enumerate(unique)}
    return torch.cat(rows)[[place[sentence] for sentence in sentences]]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two vectors, ties ranked by their average; NaN where one is constant or holds NaN."""
    if a.ndim != 1 or a.shape != b.shape:
        raise IsogridError(f"spearman: two vectors of one length, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.isnan().any() or b.isnan().any():
        return float("nan")
    x, y = average_ranks(a), average_ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64 ``(n,)``; equal values share the average of theirs."""
    _, group, sizes = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()  # the highest rank in each group
    return (last - (sizes - 1) / 2)[group]
