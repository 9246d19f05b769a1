"""``isogrid evaluate``: how good a model is."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isogrid.cli.console import console
from isogrid.cli.options import Data, Json, Model, Quick

if TYPE_CHECKING:
    from isogrid.studies.subjects import Yardstick


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
    from isogrid.studies.subjects import Yardstick, figure_of

    begun = time.perf_counter()
    yardstick = Yardstick(metric, text, 4 if quick else windows, length, data)
    result = {"model": model, **_measured(model, yardstick)}
    if against is not None:
        dense = _measured(against, dataclasses.replace(yardstick, metric=result["metric"]))
        key, _, _ = figure_of(result)
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


def _measured(name: str, yardstick: Yardstick) -> dict[str, Any]:
    """The quality of one model, with what it was measured on."""
    from isogrid.cli.source import open_model
    from isogrid.report import progress

    loaded, tokenizer = open_model(name)
    with progress("Evaluating", -(-yardstick.windows // 4) or None) as step:
        return yardstick.measure(loaded, tokenizer, name, step)
