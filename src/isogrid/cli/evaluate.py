"""``isogrid evaluate``: how good a model is."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
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
    against: Annotated[
        str | None, typer.Option(help="The dense model: it is measured, too, and the gap between the two is told.")
    ] = None,
    data: Data = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, Spearman correlation on STS-B dev, or fidelity of heat maps to the dense model's."""
    from isogrid.report import write_json

    begun = time.perf_counter()
    measured = partial(_measured, text=text, windows=windows, length=length, data=data, quick=quick)
    result = {"model": model, **measured(model, metric)}
    if against is not None:
        dense = measured(against, result["metric"])
        key = next(name for name in ("perplexity", "spearman", "heatmap_fidelity") if name in result)
        result |= {"against": against, f"dense_{key}": dense[key]}
        if key == "perplexity":
            result["gap"] = result["loss"] - dense["loss"]
    predicted = _predicted_gap(model)
    if predicted is not None:
        result["predicted_gap"] = predicted
    result["seconds"] = time.perf_counter() - begun
    if (Path(model) / "compression.json").is_file():
        write_json(result, Path(model) / "evaluation.json")  # the report of this model tells it
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


def _predicted_gap(model: str) -> float | None:
    """What the recipe that a model was compressed by had said; None without one."""
    from isogrid.report import read_json

    file = Path(model) / "compression.json"
    predicted = read_json(file).get("predicted") if file.is_file() else None
    return None if predicted is None else float(predicted["gap"])


def _measured(
    name: str, metric: str, *, text: str, windows: int, length: int, data: Path | None, quick: bool
) -> dict[str, Any]:
    """The quality of one model, with what it was measured on."""
    from isogrid.cli.source import is_language_model, is_saliency_model, open_model
    from isogrid.data import DatasetNotFoundError, load_photographs, load_pretrained, load_sts, load_text, token_windows
    from isogrid.evaluation import heatmap_fidelity, perplexity, sts_spearman
    from isogrid.report import progress

    loaded, tokenizer = open_model(name)
    if metric == "auto":
        metric = "heatmap" if is_saliency_model(loaded) else "perplexity" if is_language_model(loaded) else "sts"
    if metric in ("perplexity", "sts") and tokenizer is None:
        raise IsogridError(f"{name} has no tokenizer beside it, which {metric} needs; save one there")
    if metric == "perplexity" and not is_language_model(loaded):
        raise IsogridError(f"{type(loaded).__name__} predicts no tokens; --metric perplexity takes a language model")
    if metric == "heatmap" and not is_saliency_model(loaded):
        raise IsogridError(f"{type(loaded).__name__} draws no heat maps; --metric heatmap takes vit-s-saliency")
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
            what, images = "Kodak", load_photographs("kodak", data_dir=data)
        except DatasetNotFoundError:
            what, images = "scikit-image, the calibration photographs", load_photographs()
        fidelity = heatmap_fidelity(loaded, reference, images)
        result = {"heatmap_fidelity": fidelity, "images": f"{len(images)} {what}"}
    else:
        raise IsogridError(f"metric {metric!r} is not one of auto, perplexity, sts, heatmap")
    return {"metric": metric, **result}
