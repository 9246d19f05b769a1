"""The first experiment of the thesis: how near each format comes to a matrix, against its parameters.

Four targets (`projection_targets`), every format at the documented sizes, the documented errors beside ours.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isogrid.report import format_duration, progress, write_report
from isogrid.studies.projection_targets import TARGETS, Entry, Target
from isogrid.studies.rows import Say, heading, remembered


def run_random_projection(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study random_projection",
    say: Say = print,
) -> dict[str, Any]:
    """Project four matrices into every format at the documented sizes.

    Args:
        out: folder for the tables, one folder a target. Rows are kept in ``runs/study/random_projection`` and not
            measured again.
        quick: the two small targets, with BLAST at few sizes.
        seed: of the fits' randomness.
        data_dir: where CIFAR-10 is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the tables by target; ``quality`` is the relative error, ``reference`` the documented one.
    """
    names = [name for name in TARGETS if not quick or name in ("gaussian-256", "picture")]
    todo = {name: list(TARGETS[name].entries(quick)) for name in names}
    count = sum(len(entries) for entries in todo.values())
    say(f"{count} members on {len(names)} matrices; about {'1' if quick else '15'} minutes on two cores")
    results: dict[str, Any] = {}
    with progress("Projecting", count) as step:
        for name, entries in todo.items():
            results[name] = _one_target(name, TARGETS[name], entries, out / name, seed, data_dir, command, say, step)
    return results


def _one_target(
    name: str,
    target: Target,
    entries: list[Entry],
    out: Path,
    seed: int,
    data_dir: Path | None,
    command: str,
    say: Say,
    step: Say,
) -> dict[str, Any]:
    matrix = target.matrix(data_dir)
    rows_, columns = matrix.shape
    norm = float(matrix.norm())
    settings = {"target": target.described, "norm": f"{norm:.6g}", "seed": seed}
    runs = Path("runs/study/random_projection") / name

    def measure(entry: Entry) -> dict[str, Any]:
        begun = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        dealt = matrix.view(entry.deal, rows_ // entry.deal, columns).transpose(0, 1).reshape(rows_, columns)
        _, report = entry.format.fit_and_report(dealt, generator=generator, **entry.options)
        cost = entry.format.cost(rows_, columns)
        return {
            "label": entry.label,
            "format": entry.format.name,
            "calibrated": False,
            "requested_keep": None,
            "achieved_keep": cost.parameters / matrix.numel(),
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "quality": report.error,
            "least_error": report.least_error,
            "reference": entry.published,
            "theory": entry.theory,
            "seconds": time.perf_counter() - begun,
        }

    rows = []
    for entry in entries:
        key = entry.format.label().translate(str.maketrans("(), =[]", "-------"))
        row = remembered(runs, key, settings | {"options": entry.options, "deal": entry.deal}, partial(measure, entry))
        row["label"] = entry.label
        rows.append(row)
        step(entry.label)
        beside = "" if entry.published is None else f", {row['quality'] / entry.published:.4f} of the documented"
        say(f"{name}: {entry.format.label()}: {row['quality']:.4f}{beside}, {format_duration(row['seconds'])}")
    result = {
        **heading(target.title, command, settings),
        "quality": {"name": "relative error", "better": "lower"},
        "dense": {
            "label": "Dense",
            "format": "dense",
            "calibrated": False,
            "achieved_keep": 1.0,
            "parameters": matrix.numel(),
            "bytes": 4 * matrix.numel(),
        },
        "rows": rows,
        "notes": _notes(target, rows),
    }
    write_report(result, out)
    return result


def _notes(target: Target, rows: list[dict[str, Any]]) -> list[str]:
    documented = "errors of this very matrix" if target.same_matrix else "errors of another draw or training run"
    notes = [f"Published: {documented}, weak solvers among them; relative Frobenius errors."]
    known = [row for row in rows if row["reference"] is not None]
    if known:
        worst = max(known, key=lambda row: row["quality"] / row["reference"])
        ratio = worst["quality"] / worst["reference"]
        notes.append(f"Largest error beside the published: {worst['label']}, {ratio:.4f} of it.")
    lawful = [row for row in rows if row["theory"] is not None]
    if lawful:
        worst = max(lawful, key=lambda row: abs(row["quality"] / row["theory"] - 1))
        notes.append(
            f"{len(lawful)} rows have a law of large Gaussian matrices; farthest from it: {worst['label']}, "
            f"{worst['quality'] / worst['theory']:.4f} of it."
        )
    return notes
