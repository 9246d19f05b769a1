"""An encoder of sentences with a classification head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SentenceClassifier(nn.Module):
    """Mean of the encoder's token vectors, a hidden layer with ReLU and dropout, logits (DistilBERT's head).

    Args:
        encoder: a transformers encoder that returns ``last_hidden_state``.
        width: its width.
        classes: number of classes.
        dropout: before the logits.
        generator: source of the head's start, N(0, 0.02²).
    """

    def __init__(
        self,
        encoder: Any,
        width: int,
        classes: int = 2,
        dropout: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        # The pooler of a BERT would get no gradient.
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.pre_classifier, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for layer in (self.pre_classifier, self.classifier):
                layer.weight.copy_(0.02 * torch.randn(layer.weight.shape, generator=generator))
                layer.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(batch, classes)`` of tokens ``(batch, length)``; masked tokens do not count, None masks nothing."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.classifier(self.dropout(torch.relu(self.pre_classifier(pooled))))
