"""Advice, checked: what recipes are said to reach, beside what they reach, on the smallest model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from isogrid.compress import Advisor, Effort, Recipe, compress
from isogrid.evaluation import perplexity
from isogrid.studies.quality_ladder import ANCHOR, Subject, stories_subject
from isogrid.studies.rows import Say, gap, heading, remembered, table_page, write_table

KEEPS = (0.8, 0.6)


def run_advice(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study advice",
    say: Say = print,
) -> dict[str, Any]:
    """Three recipes at two sizes: predicted size and gap beside achieved ones.

    Args:
        out: folder for ``table.md`` and ``data.json``. Rows are kept in ``runs/study/advice``.
        quick: few windows and steps.
        seed: of fits and training.
        data_dir: where the smallest model is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.
    """
    say(f"{3 * len(KEEPS)} recipes; about {3 if quick else 20} minutes on two cores")
    subject = stories_subject(quick, data_dir)
    settings = {"calibration": len(subject.calibration), "evaluation": len(subject.evaluation), "seed": seed}
    dense = perplexity(subject.model, subject.evaluation).perplexity
    rows: list[dict[str, Any]] = []
    for keep in KEEPS:
        make = partial(_rows_at, subject, keep, dense, seed, say)
        rows += remembered(Path("runs/study/advice"), f"keep-{keep:g}", settings, make)["rows"]
    result = {**heading(f"Advice for {subject.name}: predicted and achieved", command, settings), "rows": rows}
    return write_table(result, _markdown(result), out)


def _rows_at(subject: Subject, keep: float, dense: float, seed: int, say: Say) -> dict[str, Any]:
    efforts = (
        Effort("one shot", ANCHOR),
        Effort("refined", ANCHOR, subject.refinement),
        Effort("refined and distilled", ANCHOR, subject.refinement, subject.distillation),
    )
    advisor = Advisor(
        subject.model, subject.calibration, formats=("low_rank_light",), efforts=efforts, seed=seed, say=say
    )
    return {"rows": [_followed(subject, keep, recipe, dense, seed, say) for recipe in advisor.for_keep(keep)]}


def _followed(subject: Subject, keep: float, recipe: Recipe, dense: float, seed: int, say: Say) -> dict[str, Any]:
    smaller = copy.deepcopy(subject.model)
    report = compress(smaller, recipe.plan, calibration=subject.calibration, seed=seed, **recipe.options())
    reached = gap(perplexity(smaller, subject.evaluation).perplexity, dense)
    said = recipe.predicted
    row = {
        "recipe": recipe.label,
        "keep": keep,
        "predicted_parameters": said.parameters,
        "parameters": report.parameters,
        "predicted_bytes": said.model_bytes,
        "bytes": report.model_bytes,
        "predicted_gap": said.gap,
        "gap": reached,
        "ratio": said.gap / reached,
        "predicted_seconds": said.seconds,
        "seconds": report.seconds,
    }
    say(f"{recipe.label}, keep {keep:g}: gap {said.gap:.3f} predicted, {reached:.3f} achieved ({row['ratio']:.2f})")
    return row


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [
        "| recipe | keep | parameters | predicted | bytes | predicted | gap | predicted | predicted / achieved |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['recipe']} | {row['keep']:g} | {row['parameters']} | {row['predicted_parameters']} | "
            f"{row['bytes']} | {row['predicted_bytes']} | {row['gap']:.3f} | {row['predicted_gap']:.3f} | "
            f"{row['ratio']:.2f} |"
        )
    words = "Gaps in nats a token over the dense model, on windows that neither the fits nor the predictions know."
    return table_page(result, lines, words)
