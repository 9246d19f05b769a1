"""The embedded sentence encoder in every format: Spearman correlation on STS-B dev, plain and calibrated."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from isogrid.compress import as_batches, compress, dense_parameters, select_layers, stored_bytes
from isogrid.data import load_pretrained, load_sts
from isogrid.evaluation import sts_spearman
from isogrid.report import progress, write_report
from isogrid.studies.demo import LABELS
from isogrid.studies.rows import Say, heading, remembered, row_of

MODEL = "minilm"
KEEP = 0.5
# Sizes at which Light is also anchored by half, its budget spent where the encoder is sensitive.
BEST = "low_rank_light"
BEST_KEEPS = (0.5, 0.25)
BEST_OPTIONS: dict[str, Any] = {"allocate": "global", "anchor": 0.5}
SENTENCES = 4096


def run_sentence_encoder(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study sentence_encoder",
    say: Say = print,
) -> dict[str, Any]:
    """Every format at half the parameters, calibrated on sentences of STS-B's training half without their scores.

    The best one also at a quarter, with one budget over all layers.

    Args:
        out: folder for the table. Rows are kept in ``runs/study/sentence_encoder`` and not measured again.
        quick: 512 sentences.
        seed: of the fits.
        data_dir: where STS-B is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.
    """
    count = 2 * len(LABELS) + len(BEST_KEEPS)
    say(f"{count} compressed models of {MODEL}; about {'3' if quick else '10'} minutes on two cores")
    model, tokenizer = load_pretrained(MODEL)
    train, dev = load_sts("train", data_dir), load_sts("dev", data_dir)
    sentences = list(dict.fromkeys([*train.first, *train.second]))[: 512 if quick else SENTENCES]
    settings: dict[str, Any] = {
        "calibration": f"{len(sentences)} sentences of STS-B train, without scores",
        "evaluation": f"STS-B dev, all {len(dev.scores)} pairs",
        "keep": KEEP,
        "seed": seed,
    }
    batches = as_batches(sentences, tokenizer, 128)
    runs = Path("runs/study/sentence_encoder")

    def dense_row() -> dict[str, Any]:
        return {
            "label": "Dense",
            "format": "dense",
            "calibrated": False,
            "requested_keep": None,
            "achieved_keep": 1.0,
            "parameters": dense_parameters(select_layers(model)),
            "bytes": stored_bytes(model),
            "quality": sts_spearman(model, tokenizer, dev),
        }

    def format_row(name: str, calibrated: bool, keep: float = KEEP, label: str = "", **options: Any) -> dict[str, Any]:
        smaller = copy.deepcopy(model)
        with progress(label or LABELS[name], len(select_layers(smaller))) as step:
            report = compress(
                smaller,
                name,
                keep=keep,
                calibration=batches if calibrated else None,
                seed=seed,
                on_layer=lambda layer: step(layer.name),
                **options,
            )
        row = row_of(report, label or LABELS[name], calibrated=calibrated)
        row["quality"] = sts_spearman(smaller, tokenizer, dev)
        return row

    dense = remembered(runs, "dense", settings, dense_row)
    rows = []
    for name in LABELS:
        for calibrated in (False, True):
            key = f"{name}-{'calibrated' if calibrated else 'plain'}"
            row = remembered(runs, key, settings, partial(format_row, name, calibrated))
            rows.append(row)
            say(f"{key}: Spearman {row['quality']:.4f} (dense {dense['quality']:.4f})")
    for keep in BEST_KEEPS:
        label = f"{LABELS[BEST]}, allocated and anchored"
        make = partial(format_row, BEST, True, keep, label, **BEST_OPTIONS)
        row = remembered(runs, f"{BEST}-{keep:g}-allocated", settings, make)
        rows.append(row)
        share = row["quality"] / dense["quality"]
        say(f"{label}, keep {keep:g}: Spearman {row['quality']:.4f}, {share:.1%} of dense")
    result = {
        **heading(
            "The sentence encoder all-MiniLM-L6-v2 at a half and a quarter of its parameters",
            command,
            settings,
            model=f"{MODEL} (all-MiniLM-L6-v2)",
        ),
        "quality": {"name": "Spearman", "better": "higher"},
        "dense": dense,
        "rows": rows,
        "notes": [
            "Fits are one-shot, in order, on the inputs of the part already compressed; biases take up mean errors."
        ],
    }
    write_report(result, out)
    return result
