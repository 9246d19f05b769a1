"""Calibration data, in any form that people have it, as batches that a model takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.data import TEXTS
from isogrid.errors import IsogridError

# Rows of one batch of token windows: enough to keep the products busy, few enough for the activations.
ROWS_PER_BATCH = 2048
# The same where models are trained: steps are taken, and batches held out, whole.
ROWS_PER_STEP, LEAST_STEPS = 512, 8
# Four dimensions with so many channels at most are pictures; models see them in patches of about so many pixels a side.
MOST_COLOURS, PATCH = 4, 16


def as_batches(
    calibration: Any,
    tokenizer: Any = None,
    length: int = 512,
    *,
    model: nn.Module | None = None,
    training: bool = False,
) -> list[Any]:
    """Calibration data as a list of model inputs.

    Args:
        calibration: an iterable of batches (mappings of keyword arguments, tensors, or tuples of positional
            arguments), a tensor of token windows ``(windows, length)`` or of features ``(rows, …)``, one text, or a
            list of texts (the last two with a tokenizer).
        tokenizer: a transformers tokenizer.
        length: window length in tokens for one text; also where texts of a list are cut.
        model: that they are for; one with an encoder and a decoder gets what the decoder needs (see `with_decoder`).
        training: make small batches of tensors and texts: models will be trained on some, and judged by others.

    Raises:
        IsogridError: texts without a tokenizer, or nothing at all.
    """
    rows_per_batch, least = (ROWS_PER_STEP, LEAST_STEPS) if training else (ROWS_PER_BATCH, 1)
    if length < 1:
        raise IsogridError(f"a window has at least one token, got length {length}")
    if isinstance(calibration, str):
        if calibration in TEXTS:
            raise IsogridError(f"calibration {calibration!r} is a name, not a text; pass load_text({calibration!r})")
        calibration = _windows(calibration, _required(tokenizer), length)
    if hasattr(calibration, "__array__") and not isinstance(calibration, Tensor):
        calibration = torch.as_tensor(calibration)
    batches: list[Any]
    if isinstance(calibration, Tensor):
        rows = calibration.shape[0]
        step = max(1, rows_per_batch // max(_rows_of_one(calibration), 1))
        step = min(step, -(-rows // least)) or 1
        batches = [calibration[i : i + step] for i in range(0, rows, step)]
    elif isinstance(calibration, Mapping):
        batches = [calibration]
    else:
        if not isinstance(calibration, Iterable):
            raise IsogridError(
                f"calibration is text, a tensor or an iterable of batches, got {type(calibration).__name__}"
            )
        batches = list(calibration)
        if batches and all(isinstance(item, str) for item in batches):
            batches = _padded_texts(batches, _required(tokenizer), length, rows_per_batch, least)
    if not batches:
        raise IsogridError("calibration has no rows; give at least one batch, or None for a plain fit")
    return batches if model is None else [with_decoder(model, batch) for batch in batches]


def with_decoder(model: nn.Module, batch: Any) -> Any:
    """A batch of an encoder-decoder with its decoder's mask, taken from labels; those of other models as they are.

    Where a batch has neither labels nor inputs of the decoder, that reads the encoder's tokens, one place later: as in
    training, were they the labels.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return batch
    if isinstance(batch, Tensor) and not batch.is_floating_point():
        batch = {"input_ids": batch}
    known = inspect.signature(model.forward).parameters
    if not isinstance(batch, Mapping) or "decoder_attention_mask" in batch or "decoder_attention_mask" not in known:
        return batch
    found = dict(batch)
    labels, tokens = found.get("labels"), found.get("input_ids")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        found["decoder_attention_mask"] = (labels != -100).long()
    elif isinstance(tokens, Tensor) and not found.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        start = getattr(config, "decoder_start_token_id", None)
        found["decoder_input_ids"] = tokens.roll(1, -1)
        found["decoder_input_ids"][:, 0] = start or 0
        if isinstance(found.get("attention_mask"), Tensor):
            found["decoder_attention_mask"] = found["attention_mask"]
    return found


def _rows_of_one(calibration: Tensor) -> int:
    """How many rows one item is to a model's layers: tokens, patches of a picture, or rows of features."""
    inner = calibration.shape[1:]
    if not calibration.is_floating_point():
        return inner.numel()
    if len(inner) == 3 and inner[0] <= MOST_COLOURS:
        return inner[1] * inner[2] // PATCH**2
    return inner[:-1].numel()


def _required(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise IsogridError("calibration by text needs the model's tokenizer; pass tokenizer=…")
    return tokenizer


def _windows(text: str, tokenizer: Any, length: int) -> Tensor:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if ids.numel() == 0:
        raise IsogridError("calibration has no rows: the text is empty")
    count = ids.numel() // length
    return ids[: count * length].view(count, length) if count else ids.unsqueeze(0)


def _padded_texts(texts: Sequence[str], tokenizer: Any, length: int, rows_per_batch: int, least: int) -> list[Any]:
    # Sorted by length: little padding, and the rows don't care for the order. A blank text may have no token at all.
    texts = sorted((text for text in texts if text.strip()), key=len)
    if not texts:
        raise IsogridError("calibration has no rows: the texts are empty")
    out, at = [], 0
    while at < len(texts):
        longest = min(max(len(texts[min(at + 63, len(texts) - 1)]) // 3, 1), length)
        step = min(64, max(1, rows_per_batch // longest), -(-len(texts) // least))
        out.append(_padded(texts[at : at + step], tokenizer, length))
        at += step
    return out


def _padded(texts: Sequence[str], tokenizer: Any, length: int) -> Any:
    options = {"truncation": True, "max_length": length}
    if getattr(tokenizer, "pad_token_id", 0) is not None:
        return tokenizer(texts, padding=True, return_tensors="pt", **options)
    # Language models' tokenizers have no token for padding; under the mask any will do.
    ids = [torch.tensor(row) for row in tokenizer(texts, **options)["input_ids"]]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=tokenizer.eos_token_id or 0),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
    }
