"""``isogrid evaluate``: how good a model is."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from isogrid.cli.console import console
from isogrid.cli.options import Data, Json, Model, Quick
from isogrid.errors import IsogridError


def evaluate(
    model: Model,
    metric: Annotated[str, typer.Option(help="auto, perplexity, sts or heatmap.")] = "auto",
    text: Annotated[str, typer.Option(help="Text for the perplexity.")] = "wikitext2:evaluation",
    windows: Annotated[int, typer.Option(min=0, help="Windows of --length tokens; 0: all.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    data: Data = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, Spearman correlation on STS-B dev, or fidelity of heat maps to the dense model's."""
    from isogrid.cli.source import is_language_model, is_saliency_model, open_model
    from isogrid.data import DatasetNotFoundError, load_photographs, load_pretrained, load_sts, load_text, token_windows
    from isogrid.evaluation import heatmap_fidelity, perplexity, sts_spearman
    from isogrid.report import progress

    loaded, tokenizer = open_model(model)
    if metric == "auto":
        metric = "heatmap" if is_saliency_model(loaded) else "perplexity" if is_language_model(loaded) else "sts"
    if metric in ("perplexity", "sts") and tokenizer is None:
        raise IsogridError(f"{model} has no tokenizer beside it, which {metric} needs; save one there")
    if metric == "perplexity" and not is_language_model(loaded):
        raise IsogridError(f"{type(loaded).__name__} predicts no tokens; --metric perplexity takes a language model")
    if metric == "heatmap" and not is_saliency_model(loaded):
        raise IsogridError(f"{type(loaded).__name__} draws no heat maps; --metric heatmap takes vit-s-saliency")
    begun = time.perf_counter()
    result: dict[str, Any]
    if metric == "perplexity":
        limit = 4 if quick else windows or None
        ids = token_windows(tokenizer, load_text(text, data), length, limit)
        with progress("Evaluating", -(-len(ids) // 4)) as step:
            found = perplexity(loaded, ids, progress=step)
        result = {"perplexity": found.perplexity, "loss": found.loss, "tokens": found.tokens, "text": text}
    elif metric == "sts":
        pairs = load_sts("dev", data)
        result = {"spearman": sts_spearman(loaded, tokenizer, pairs), "pairs": len(pairs.scores)}
    elif metric == "heatmap":
        reference, _ = load_pretrained("vit-s-saliency")
        try:  # other pictures than `--calibrate photographs` takes
            name, images = "Kodak", load_photographs("kodak", data_dir=data)
        except DatasetNotFoundError:
            name, images = "scikit-image, the calibration photographs", load_photographs()
        fidelity = heatmap_fidelity(loaded, reference, images)
        result = {"heatmap_fidelity": fidelity, "images": f"{len(images)} {name}"}
    else:
        raise IsogridError(f"metric {metric!r} is not one of auto, perplexity, sts, heatmap")
    result = {"model": model, "metric": metric, **result, "seconds": time.perf_counter() - begun}
    if as_json:
        console.print_json(json.dumps(result))
    else:
        console.print(
            ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
            ),
            highlight=False,
            soft_wrap=True,
        )
