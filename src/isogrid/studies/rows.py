"""Rows of a compression table, and the bookkeeping that lets a long table go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import isogrid
from isogrid.compress import CompressionReport
from isogrid.report import (
    describe_machine,
    format_bytes,
    format_duration,
    format_gap,
    format_keep,
    format_milliseconds,
    format_quality,
    read_json,
    replace_file,
    today,
    write_json,
)
from isogrid.studies.subjects import figure_of

Say = Callable[[str], None]
# What tables of layers and their pictures read: rows are many, and their layers more.
LAYER_KEYS = ("name", "format", "out", "in", "parameters", "dense_parameters", "error", "least_error", "held_error")
# Whose code a row depends on.
ROOMS = (
    "checkpoint", "compress", "data", "evaluation", "fitting", "formats", "kernels", "linear", "models", "optim",
    "training",
)  # fmt: skip
PLAIN_ERRORS = "Errors are relative Frobenius errors of the matrices"


def row_of(report: CompressionReport, label: str, *, calibrated: bool) -> dict[str, Any]:
    """The part of a row that the compression itself knows."""
    return {
        "label": label,
        "format": " + ".join(one.name for one in report.formats),
        "calibrated": calibrated,
        "requested_keep": report.requested_keep,
        "achieved_keep": report.achieved_keep,
        "parameters": report.parameters,
        "bytes": report.model_bytes,
        "seconds": report.seconds,
        "layers": [{key: layer.to_dict()[key] for key in LAYER_KEYS} for layer in report.layers],
        "warnings": list(report.warnings),
    }


def gap(perplexity: float, dense: float) -> float:
    """``log(perplexity) - log(dense perplexity)``."""
    return math.log(perplexity) - math.log(dense)


def remembered(
    folder: Path, key: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The row stored under a key for the same settings, or a new one, made and stored.

    Args:
        folder: where rows are kept.
        key: name of the row.
        settings: what the row depends on; another value, or other code behind it, makes the row anew.
        make: measures the row.
    """
    path = folder / f"{unmistakable(key, settings)}.json"
    if path.is_file():
        return read_json(path)
    return stored_row(folder, key, settings, make())


def stored_row(folder: Path, key: str, settings: Mapping[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row, put where `remembered` finds it, as it then reads."""
    path = folder / f"{unmistakable(key, settings)}.json"
    write_json(row, path)
    return read_json(path)


def unmistakable(key: str, settings: Mapping[str, Any]) -> str:
    """A row's key with a hash of all that it depends on: its settings and the code behind it."""
    described = json.dumps([key, settings, _state_of_code()], sort_keys=True, default=str)
    return f"{key}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def fingerprint(value: Any) -> str:
    """A hash of the numbers of a model, a tensor, or containers of tensors; of anything else, of how it prints."""
    digest = hashlib.sha256()

    def add(one: Any) -> None:
        if isinstance(one, nn.Module):
            add(one.state_dict())
        elif isinstance(one, Tensor):
            digest.update(f"{one.dtype} {tuple(one.shape)}".encode())
            digest.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(one, Mapping):
            for key, part in one.items():
                digest.update(str(key).encode())
                add(part)
        elif isinstance(one, list | tuple):
            for part in one:
                add(part)
        else:
            digest.update(str(one).encode())

    add(value)
    return digest.hexdigest()[:12]


@cache
def _state_of_code() -> str:
    """Hash of the code that rows are made by, as it stood when this process asked first."""
    digest = hashlib.sha256()
    package = Path(isogrid.__file__).parent
    for room in ROOMS:
        for path in sorted((package / room).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def heading(
    title: str, command: str, settings: Mapping[str, Any] | None = None, *, model: str | None = None
) -> dict[str, Any]:
    """What every study's data begins with: title, command, model, date, machine and settings.

    Args:
        title: of the page.
        command: the command line that makes it.
        settings: what the numbers depend on; None where the title says it.
        model: the model's name; None where there is no single one.
    """
    return {
        "title": title,
        "command": command,
        **({} if model is None else {"model": model}),
        "created": today(),
        "machine": describe_machine(isogrid.__version__),
        **({} if settings is None else {"settings": settings}),
    }


def table_page(result: Mapping[str, Any], lines: Iterable[str], words: str) -> str:
    """A study's ``table.md``: its title, the lines of its tables, what there is to know of them, machine and command.

    Args:
        result: begins with `heading`.
        lines: of the tables.
        words: a paragraph.
    """
    machine = ", ".join(f"{key}: {value}" for key, value in result["machine"].items())
    return "\n".join(
        [
            f"# {result['title']}",
            "",
            *lines,
            "",
            words,
            "",
            f"- {machine}, {result['created']}",
            "",
            f"    {result['command']}",
            "",
        ]
    )


def write_table(result: Mapping[str, Any], page: str, out: Path) -> dict[str, Any]:
    """Write ``data.json``, ``table.md`` and ``command.txt``; the data as it then reads."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, out / "data.json")
    replace_file(out / "table.md", page.encode())
    replace_file(out / "command.txt", f"{result['command']}\n".encode())
    return read_json(out / "data.json")


def page_of_compression(described: Mapping[str, Any], evaluated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The data of a page for one compressed model.

    Args:
        described: the ``compression.json`` that was written beside it.
        evaluated: what `isogrid evaluate` kept there; None: the quality was not measured.
    """
    calibrated = described["calibration"] is not None
    evaluated = evaluated or {}
    quality, dense_quality, named = _quality(evaluated)
    note = "Errors are relative output errors on the calibration data" if calibrated else PLAIN_ERRORS
    return {
        "title": f"{described['model']} as {described['label']}",
        "command": described["command"],
        "model": described["model"],
        "settings": {"calibration": described["calibration"] or "none: plain fits"},
        **named,
        "dense": {
            "label": "dense",
            "format": "dense",
            "calibrated": False,
            "achieved_keep": 1.0,
            "parameters": described["dense_parameters"],
            "bytes": described["dense_model_bytes"],
            **dense_quality,
        },
        "rows": [
            {
                "label": " or ".join(one["name"].replace("_", " ") for one in described["formats"]),
                "format": " + ".join(one["name"] for one in described["formats"]),
                "calibrated": calibrated,
                "requested_keep": described["requested_keep"],
                "achieved_keep": described["achieved_keep"],
                "parameters": described["parameters"],
                "bytes": described["model_bytes"],
                "seconds": described["seconds"],
                "peak_memory": described.get("peak_memory"),
                "layers": described["layers"],
                "warnings": described["warnings"],
                **quality,
            }
        ],
        "outcome": _outcome(described, evaluated),
        "notes": [f"{note}." if quality else f"{note}; the model's quality was not measured: isogrid evaluate does."],
    }


def _quality(evaluated: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What `isogrid evaluate` has measured, for the row, for the dense row, and what it is called; nothing without."""
    if not evaluated:
        return {}, {}, {}
    key, value, better = figure_of(evaluated)
    dense = f"dense_{key}"
    row = {"quality": value} | ({"gap": evaluated["gap"]} if "gap" in evaluated else {})
    before = {"quality": evaluated[dense]} if dense in evaluated else {}
    return row, before, {"quality": {"name": key.replace("_", " "), "better": better}}


def _outcome(described: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[dict[str, str]]:
    """Sizes, times and the gap: as asked for, as predicted by a recipe or a budget in time, and as they came out."""
    said = described.get("predicted") or {}
    times = described.get("milliseconds") or {}
    now, before = ((times.get(name) or {}).get("median") for name in ("structured", "dense"))

    def line(figure: str, spell: Callable[[Any], str], requested: Any, predicted: Any, achieved: Any) -> dict[str, str]:
        values = {"requested": requested, "predicted": predicted, "achieved": achieved}
        return {"figure": figure} | {key: spell(value) for key, value in values.items()}

    lines = [
        line("keep", format_keep, described["requested_keep"], said.get("keep"), described["achieved_keep"]),
        line("size of the model", format_bytes, None, said.get("model_bytes"), described["model_bytes"]),
        line("compression", format_duration, None, said.get("seconds", described.get("estimate")),
             described["seconds"]),
    ]  # fmt: skip
    if now is not None:
        predicted = described.get("predicted_milliseconds")
        limit = described.get("limit_milliseconds")
        lines.append(line(f"a pass (dense {before:.4g} ms)", format_milliseconds, limit, predicted, now))
    blocks = described.get("blocks") or ()
    if blocks:
        before, after = (statistics.median(block[key] for block in blocks) for key in ("before", "after"))
        lines.append(line("median error of a refined block", _from_to, None, None, (before, after)))
    distilled = described.get("distilled")
    if distilled:
        reached = distilled["before"], distilled["after"]
        lines.append(line("distance from the dense model, distilled", _from_to, None, None, reached))
    if said or "gap" in evaluated:
        lines.append(line("gap", format_gap, None, said.get("gap"), evaluated.get("gap")))
    return lines


def _from_to(values: tuple[float, float] | None) -> str:
    """What training has brought."""
    return " → ".join(format_quality(value) for value in values or (None,))
