"""What suits a model: how good it is, what it is calibrated on, what its passes are timed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isogrid.data import (
    DatasetNotFoundError,
    load_photographs,
    load_pretrained,
    load_sts,
    load_text,
    token_windows,
)
from isogrid.errors import IsogridError
from isogrid.evaluation import heatmap_fidelity, is_language_model, perplexity, sts_spearman

METRICS = ("perplexity", "sts", "heatmap")


@dataclass(frozen=True)
class Yardstick:
    """How a model's quality is measured.

    Attributes:
        metric: one of `METRICS`; "auto": the one for this kind of model.
        text: for the perplexity; a name or a file.
        windows: of the text; 0: all.
        length: tokens of a window.
        data_dir: where data is looked up first.
    """

    metric: str = "auto"
    text: str = "wikitext2:evaluation"
    windows: int = 32
    length: int = 512
    data_dir: Path | None = None

    def measure(self, model: Any, tokenizer: Any, name: str, step: Any = None) -> dict[str, Any]:
        """Perplexity, Spearman correlation on STS-B dev, or fidelity of heat maps to the dense model's.

        Args:
            model: in eval mode.
            tokenizer: of it; None where it has none.
            name: of the model, for messages.
            step: called after each batch of windows.

        Raises:
            IsogridError: the metric is unknown or not this model's, or there is no tokenizer.
        """
        metric = self.metric
        if metric == "auto":
            metric = "heatmap" if is_saliency_model(model) else "perplexity" if is_language_model(model) else "sts"
        if metric not in METRICS:
            raise IsogridError(f"metric {metric!r} is not one of auto, {', '.join(METRICS)}")
        if metric in ("perplexity", "sts") and tokenizer is None:
            raise IsogridError(f"{name} has no tokenizer beside it, which {metric} needs; save one there")
        if metric == "perplexity" and not is_language_model(model):
            raise IsogridError(f"{type(model).__name__} predicts no tokens; --metric perplexity takes a language model")
        if metric == "sts" and (is_language_model(model) or is_saliency_model(model)):
            raise IsogridError(f"{type(model).__name__} embeds no sentences; --metric sts takes an encoder")
        if metric == "heatmap" and not is_saliency_model(model):
            raise IsogridError(f"{type(model).__name__} draws no heat maps; --metric heatmap takes vit-s-saliency")
        if metric == "perplexity":
            ids = token_windows(tokenizer, load_text(self.text, self.data_dir), self.length, self.windows or None)
            found = perplexity(model, ids, progress=step)
            result = {"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens, "text": self.text}
        elif metric == "sts":
            pairs = load_sts("dev", self.data_dir)
            result = {"spearman": sts_spearman(model, tokenizer, pairs), "pairs": len(pairs.scores)}
        else:
            reference, _ = load_pretrained("vit-s-saliency")
            try:  # other pictures than `--calibrate photographs` takes
                what, images = "Kodak", load_photographs("kodak", data_dir=self.data_dir)
            except DatasetNotFoundError:
                what, images = "scikit-image, the calibration photographs", load_photographs()
            fidelity = heatmap_fidelity(model, reference, images)
            result = {"heatmap_fidelity": fidelity, "images": f"{len(images)} {what}"}
        return {"metric": metric, **result}


def figure_of(measured: Mapping[str, Any]) -> tuple[str, float, str]:
    """(name, value, the better direction) of what a `Yardstick` has measured."""
    for name, better in (("perplexity", "lower"), ("spearman", "higher"), ("heatmap_fidelity", "higher")):
        if name in measured:
            return name, float(measured[name]), better
    raise IsogridError(f"nothing was measured: {dict(measured)}")


def timed_inputs(model: Any, tokens: int, rows: int = 1) -> Any:
    """Windows of tokens for a model that takes tokens; None for others: a row of their calibration data is timed.

    Raises:
        IsogridError: more tokens than the model has positions for.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    longest = getattr(config, "max_position_embeddings", None) or tokens
    if tokens > longest:
        raise IsogridError(
            f"a pass of {tokens} tokens is to be timed, beyond the model's {longest} positions; take fewer"
        )
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


def is_saliency_model(model: Any) -> bool:
    """Whether the model draws heat maps."""
    return hasattr(model, "config") and getattr(model.config, "model_type", "") == "isogrid_vit_saliency"


def calibration_data(
    source: str, model: Any, tokenizer: Any, *, windows: int, length: int, data_dir: Path | None
) -> Tensor | list[str]:
    """Calibration data by name, in the form the model takes.

    ``photographs`` are images; ``sts:train`` a list of sentences; any other source is a text (`load_text`): token
    windows for a language model, its paragraphs for an encoder.
    """
    if source == "photographs":
        if getattr(model, "main_input_name", "") != "pixel_values" and not is_saliency_model(model):
            raise IsogridError(
                f"calibration 'photographs' is images, {type(model).__name__} takes text; try --calibrate pydoc"
            )
        return load_photographs()
    if is_saliency_model(model):
        raise IsogridError(f"calibration {source!r} is text, the model takes images; use --calibrate photographs")
    if tokenizer is None:
        raise IsogridError("the model has no tokenizer beside it, which calibration by text needs")
    if source == "sts:train":
        pairs = load_sts("train", data_dir)
        return list(dict.fromkeys([*pairs.first, *pairs.second]))[: 32 * windows]
    text = load_text(source, data_dir)
    if is_language_model(model):
        return token_windows(tokenizer, text, length, windows)
    paragraphs = [part.strip() for part in text.splitlines() if len(part.split()) > 4]
    return paragraphs[: 8 * windows]
