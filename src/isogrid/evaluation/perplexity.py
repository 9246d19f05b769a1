"""Perplexity of a causal language model, by one definition everywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import IsogridError
from isogrid.evaluation.mode import device_of, evaluating


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
        perplexity: ``exp(loss)``; infinite where that overflows.
        loss: mean cross entropy, in nats a scored token.
        tokens: how many tokens were scored.
        seconds: wall-clock time.
    """

    perplexity: float
    loss: float
    tokens: int
    seconds: float


def is_language_model(model: Any) -> bool:
    """Whether the model predicts next tokens."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int = 4,
    progress: Callable[[str], object] | None = None,
) -> Perplexity:
    """Perplexity over windows of tokens; each window's first token is unscored, and windows don't see each other.

    The cross entropy is computed in float32 from logits of the model's dtype, and summed in float64. One batch of
    logits is held at a time. The model is put into eval mode and left in the mode it was in.

    Args:
        model: gives logits ``(batch, length, vocabulary)`` for ids ``(batch, length)``, itself or as ``.logits``.
        windows: integer ids ``(windows, length)``, length at least 2.
        batch: windows in a forward pass.
        progress: called after each of the ``ceil(windows / batch)`` passes with the loss so far, as text.

    Raises:
        IsogridError: no windows, windows of fewer than two tokens, ids that aren't integers or not in the vocabulary.
    """
    _check(model, windows, batch)
    begun = time.perf_counter()
    device = device_of(model)
    # A cache of keys and values is of no use here and would be filled for every window.
    options: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    total = 0.0
    tokens = 0
    with evaluating(model):
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device=device, dtype=torch.int64)
            total += _summed_loss(model(ids, **options), ids)
            tokens += ids[:, 1:].numel()
            if progress is not None:
                progress(f"loss {total / tokens:.3f}")
    loss = total / tokens
    return Perplexity(
        perplexity=math.inf if loss > 700 else math.exp(loss),
        loss=loss,
        tokens=tokens,
        seconds=time.perf_counter() - begun,
    )


def _summed_loss(output: Any, ids: Tensor) -> float:
    """Cross entropy of one batch, in nats; a function of its own so that no name keeps the logits alive after it."""
    logits = output if isinstance(output, Tensor) else output.logits  # (batch, length, vocabulary)
    total = 0.0
    # Window by window: the float32 copies then stay small beside the batch.
    for window, scores in zip(ids, logits, strict=True):
        losses = nn.functional.cross_entropy(scores[:-1].float(), window[1:], reduction="none")
        total += losses.double().sum().item()
    return total


def _check(model: nn.Module, windows: Tensor, batch: int) -> None:
    if windows.dtype.is_floating_point or windows.dtype.is_complex or windows.dtype == torch.bool:
        raise IsogridError(f"perplexity: windows hold token ids, so integers; got {windows.dtype}")
    if windows.ndim != 2 or windows.shape[1] < 2 or windows.shape[0] == 0:
        raise IsogridError(
            f"perplexity: windows have the shape (windows, length) with a window at least and two tokens in each; "
            f"got {tuple(windows.shape)}"
        )
    if batch < 1:
        raise IsogridError(f"perplexity: batch is {batch}; it has to be at least 1")
    vocabulary = _vocabulary(model)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise IsogridError(
            f"perplexity: windows hold the ids {low} to {high}, and the model knows 0 to "
            f"{'?' if vocabulary is None else vocabulary - 1}; tokenise with the model's own tokenizer"
        )


def _vocabulary(model: nn.Module) -> int | None:
    """How many tokens the model knows: the rows of its embedding, or what its config says."""
    embedding: Any = getattr(model, "get_input_embeddings", None)
    if embedding is not None:
        rows = getattr(embedding(), "num_embeddings", None)
        if rows is not None:
            return int(rows)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return None if size is None else int(size)
