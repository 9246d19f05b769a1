"""The main job on a real model: every format at two sizes, plain and calibrated, measured and written down."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import save
from isogrid.compress import Moments, collect_moments, compress, dense_parameters, select_layers, stored_bytes
from isogrid.data import DatasetNotFoundError, load_pretrained, load_text, token_windows
from isogrid.evaluation import interleaved_medians, peak_memory_bytes, perplexity
from isogrid.report import format_bytes, format_duration, progress, write_json, write_report
from isogrid.studies.rows import Say, gap, heading, remembered, row_of

MODEL = "smollm2-135m"
LENGTH = 512
LATENCY_TOKENS = 128

# Two rounds of block descent instead of the default three: a third buys a few percent for half the time again.
OPTIONS: dict[str, dict[str, Any]] = {"monarch": {"sweeps": 2}, "block_tensor_train": {"sweeps": 2}}

LABELS = {
    "low_rank": "Low rank",
    "low_rank_light": "Low-Rank Light",
    "monarch": "Monarch",
    "block_tensor_train": "Block Tensor-Train",
}


@dataclass(frozen=True)
class Recipe:
    """One row: a format, how much to keep, and whether the fit knows the inputs."""

    format: str
    keep: float
    calibrated: bool

    @property
    def key(self) -> str:
        """Name of the row and of its model folder."""
        return f"{self.format}-{self.keep:g}{'' if self.calibrated else '-plain'}"

    @property
    def label(self) -> str:
        """Name in tables."""
        return LABELS[self.format]


FULL = [Recipe("low_rank", 0.8, False)] + [Recipe(name, keep, True) for keep in (0.8, 0.6) for name in LABELS]
QUICK = [Recipe("low_rank", 0.8, False), Recipe("low_rank", 0.8, True), Recipe("low_rank_light", 0.8, True)]


def run_demo(
    out: Path,
    *,
    windows: int = 16,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid demo",
    say: Say = print,
) -> dict[str, Any]:
    """Compress the embedded language model by every recipe; write models, table, pictures and page under ``out``.

    Args:
        out: folder; rows that are there already, for the same settings, are not measured again.
        windows: calibration windows and evaluation windows of 512 tokens.
        quick: four windows and three recipes.
        seed: of the fits.
        data_dir: where WikiText-2 is looked up first; where it can't be had, the documentation of Python serves.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.
    """
    begun = time.perf_counter()
    windows = min(windows, 4) if quick else windows
    recipes = QUICK if quick else FULL
    say(f"{len(recipes)} compressed models of {MODEL}; about {'2' if quick else '12'} minutes on two cores")
    model, tokenizer = load_pretrained(MODEL)
    calibration, evaluation, texts = _texts(tokenizer, windows, data_dir)
    settings: dict[str, Any] = {
        "calibration": f"{windows} windows of {LENGTH} tokens, {texts[0]}",
        "evaluation": f"the first {windows} windows of {LENGTH} tokens, {texts[1]}",
        "moments": "of the dense model, collected once",
        "latency": f"one pass over {LATENCY_TOKENS} tokens, median of interleaved runs against the dense model",
        "dtype": "float32",
        "fits": "Monarch and Block Tensor-Train: two rounds of block descent",
        "seed": seed,
    }
    rows_folder = out / "rows"
    measure = partial(_perplexity, windows=evaluation)

    def dense_row() -> dict[str, Any]:
        found = measure(model, "dense")
        return {
            "label": "Dense",
            "format": "dense",
            "calibrated": False,
            "requested_keep": None,
            "achieved_keep": 1.0,
            "parameters": dense_parameters(select_layers(model)),
            "bytes": stored_bytes(model),
            "quality": found,
        }

    dense = remembered(rows_folder, "dense", settings, dense_row)
    say(f"dense: perplexity {dense['quality']:.2f}")
    moments: Moments | None = None

    def recipe_row(recipe: Recipe) -> dict[str, Any]:
        nonlocal moments
        if recipe.calibrated and moments is None:
            with progress("Calibrating", windows) as step:
                moments = collect_moments(model, select_layers(model), calibration, on_batch=lambda *_: step())
        smaller = copy.deepcopy(model)
        with progress(f"{recipe.label} at {recipe.keep:g}", dense["layers_total"]) as step:
            report = compress(
                smaller,
                recipe.format,
                keep=recipe.keep,
                calibration=moments if recipe.calibrated else None,
                seed=seed,
                on_layer=lambda layer: step(layer.name),
                **(OPTIONS.get(recipe.format, {}) if recipe.calibrated else {}),
            )
        folder = save(smaller, out / "models" / recipe.key, tokenizer=tokenizer)
        row = row_of(report, recipe.label, calibrated=recipe.calibrated)
        row["quality"] = measure(smaller, recipe.label)
        row["gap"] = gap(row["quality"], dense["quality"])
        row |= _latency(model, smaller, calibration[:1, :LATENCY_TOKENS])
        row["folder"] = str(folder.relative_to(out))
        return row

    dense["layers_total"] = len(select_layers(model))
    rows = []
    for recipe in recipes:
        row = remembered(rows_folder, recipe.key, settings, partial(recipe_row, recipe))
        rows.append(row)
        how = "calibrated" if recipe.calibrated else "plain"
        say(
            f"{recipe.label}, {how}, keep {recipe.keep:g} (achieved {row['achieved_keep']:.4f}): perplexity "
            f"{row['quality']:.4g}, {row['latency_ratio']:.2f} x dense speed, {format_duration(row['seconds'])}"
        )
    del dense["layers_total"]
    dense["latency_ms"] = rows[0]["dense_latency_ms"]
    for row in rows:  # each ratio was measured against a dense run of its own: one scale for the table
        row["latency_ms"] = dense["latency_ms"] / row["latency_ratio"]
    dense["latency_ratio"] = 1.0
    result = {
        **heading("SmolLM2-135M in structured formats", command, settings, model=f"{MODEL} (SmolLM2-135M-Instruct)"),
        "quality": {"name": "perplexity", "better": "lower"},
        "dense": dense,
        "rows": rows,
        "notes": [
            "Kept fractions count the matrices inside the blocks; bytes are the whole model's, with its embedding.",
            "Perplexities are of windows of 512 tokens of the other half of the calibration text's articles; they "
            "can't be compared with published ones.",
            "One-shot fits without allocation over layers or refinement; times leave out the shared calibration.",
            f"Whole run: peak memory {format_bytes(peak_memory_bytes())}, "
            f"{format_duration(time.perf_counter() - begun)} since the last start.",
        ],
    }
    write_json(result, out / "data.json")
    write_report(result, out)
    return result


def _texts(tokenizer: Any, windows: int, data_dir: Path | None) -> tuple[Tensor, Tensor, tuple[str, str]]:
    """(calibration windows, evaluation windows, names): WikiText-2, or the two halves of Python's documentation."""
    try:
        names = ("wikitext2:calibration", "wikitext2:evaluation")
        texts = [load_text(name, data_dir) for name in names]
        described = ("WikiText-2 test articles, second half", "WikiText-2 test articles, first half")
    except DatasetNotFoundError:
        whole = load_text("pydoc")
        texts = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        described = ("Python's documentation topics, first half", "Python's documentation topics, second half")
    calibration, evaluation = (token_windows(tokenizer, text, LENGTH, windows) for text in texts)
    return calibration, evaluation, described


def _perplexity(model: nn.Module, name: str, *, windows: Tensor) -> float:
    with progress(f"Evaluating {name}", -(-len(windows) // 4)) as step:
        return perplexity(model, windows, progress=step).perplexity


def _latency(dense: nn.Module, smaller: nn.Module, ids: Tensor) -> dict[str, float]:
    """Milliseconds of one pass, dense and compressed interleaved, and their quotient."""
    with torch.no_grad():
        timings = interleaved_medians(
            {"dense": lambda: dense(ids), "smaller": lambda: smaller(ids)}, repeats=5, warmup=1
        )
    before, after = timings["dense"].median, timings["smaller"].median
    return {"latency_ms": after, "dense_latency_ms": before, "latency_ratio": before / after}
