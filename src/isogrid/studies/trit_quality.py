"""What trit planes cost a model: the published loop, many starts and error feedback, between roundings to 3 and 4 bits.

Quality is judged on models that were trained in float32. SmolLM2 comes here from a file of 4 bits: what fits its grid
loses less than it would elsewhere, so it is only reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isogrid.compress import Plan, as_batches, compress, dense_parameters, select_layers, stored_bytes
from isogrid.data import load_pretrained, load_sts, load_text, token_windows
from isogrid.errors import IsogridError
from isogrid.evaluation import perplexity, sts_spearman
from isogrid.formats import Format, Quantized, TritPlanes
from isogrid.report import progress, write_report
from isogrid.studies.quality_ladder import stories_subject
from isogrid.studies.rows import Say, gap, heading, remembered, row_of

PARTS = ("encoder", "stories", "smollm")
GROUP = 128
SENTENCES = 4096


@dataclass(frozen=True)
class Way:
    """One row: how the matrices are written, and by which solver."""

    key: str
    label: str
    format: Format
    calibrated: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _rounded(key: str, label: str, bits: int, *, calibrated: bool = False) -> Way:
    return Way(key, label, Quantized(bits=bits, group=GROUP), calibrated)


def _planes(key: str, label: str, planes: int = 2, *, calibrated: bool = False, **options: Any) -> Way:
    return Way(key, label, TritPlanes(planes=planes, group=GROUP), calibrated, options)


WAYS = (
    _rounded("rounded3", "Rounding, 3 bits", 3),
    _rounded("rounded4", "Rounding, 4 bits", 4),
    _planes("published", "2 planes, published loop", solver="ptqtp"),
    _planes("plain", "2 planes, many starts", solver="multistart"),
    _planes("moved", "2 planes, many starts, biases moved", calibrated=True, solver="multistart"),
    _planes("diagonal", "2 planes, weighted", calibrated=True, solver="diagonal"),
    _planes("feedback", "2 planes, column feedback", calibrated=True, solver="feedback"),
    _planes("default", "2 planes, feedback and sweeps", calibrated=True),
    _rounded("gptq3", "GPTQ, 3 bits", 3, calibrated=True),
    _rounded("gptq4", "GPTQ, 4 bits", 4, calibrated=True),
    _planes("one", "1 plane, feedback and sweeps", 1, calibrated=True),
    _planes("three_plain", "3 planes, many starts", 3, solver="multistart"),
    _planes("three", "3 planes, feedback and sweeps", 3, calibrated=True),
)


@dataclass(frozen=True)
class Case:
    """The model of a part, what it is calibrated on, and how it is judged."""

    name: str
    model: nn.Module
    batches: list[Any]
    calibration: str
    evaluation: str
    quality: dict[str, str]
    judge: Callable[[nn.Module], float]


def run_trit_quality(
    out: Path,
    *,
    part: str = "encoder",
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study trit_quality",
    say: Say = print,
) -> dict[str, Any]:
    """One model in trit planes, by every solver.

    Args:
        out: folder; the table is written to ``out/part``. Rows are kept in ``runs/study/trit_quality``.
        part: "encoder", the sentence encoder on STS-B; "stories", the smallest language model; "smollm", SmolLM2.
        quick: less calibration.
        seed: of the fits.
        data_dir: where data is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.

    Raises:
        IsogridError: unknown part.
    """
    if part not in PARTS:
        raise IsogridError(f"trit_quality has the parts {', '.join(PARTS)}; got {part!r}")
    minutes = {"encoder": 12, "stories": 2, "smollm": 55}[part]
    say(f"{len(WAYS)} rows; about {minutes} minutes on two cores, less for rows that are there already")
    case = {"encoder": _encoder, "stories": _stories, "smollm": _smollm}[part](quick, data_dir)
    settings: dict[str, Any] = {
        "calibration": case.calibration,
        "evaluation": case.evaluation,
        "group": GROUP,
        "seed": seed,
    }
    runs = Path("runs/study/trit_quality") / part

    def dense_row() -> dict[str, Any]:
        return {
            "label": "Dense",
            "format": "dense",
            "calibrated": False,
            "achieved_keep": 1.0,
            "parameters": dense_parameters(select_layers(case.model)),
            "bytes": stored_bytes(case.model),
            "quality": case.judge(case.model),
        }

    dense = remembered(runs, "dense", settings, dense_row)
    rows = []
    for way in WAYS:
        rows.append(remembered(runs, way.key, settings, partial(_row, way, case, seed)))
        last = rows[-1]
        if case.quality["better"] == "lower":
            last["gap"] = gap(last["quality"], dense["quality"])
        say(f"{way.label}: {last['quality']:.4f} (dense {dense['quality']:.4f}), {last['bits']:.2f} bits a weight")
    result = {
        **heading(f"Trit planes: {case.name}", command, settings, model=case.name),
        "quality": case.quality,
        "dense": dense,
        "rows": rows,
        "notes": [
            f"Rounding: to the nearest of evenly spaced values between the least and the largest of {GROUP} weights. "
            "Bits a weight count codes, scales and zeros as they are stored here, scales in the model's dtype.",
            "Calibrated rows move the mean error into biases, where there are any; «biases moved» does nothing else.",
        ],
    }
    write_report(result, out / part)
    return result


def _row(way: Way, case: Case, seed: int) -> dict[str, Any]:
    smaller = copy.deepcopy(case.model)
    layers = select_layers(smaller)
    dtype = next(smaller.parameters()).dtype
    with progress(way.label, len(layers)) as step:
        report = compress(
            smaller,
            Plan(dict.fromkeys(layers, way.format), (way.format,)),
            calibration=case.batches if way.calibrated else None,
            seed=seed,
            on_layer=lambda layer: step(layer.name),
            **way.options,
        )
    stored = sum(one.format.cost(one.out_features, one.in_features, dtype).bits for one in report.layers)
    bits = stored / sum(one.dense_parameters for one in report.layers)
    row = row_of(report, f"{way.label}, {bits:.2f} bits", calibrated=way.calibrated)
    return row | {"way": way.key, "bits": bits, "requested_keep": None, "quality": case.judge(smaller)}


def _encoder(quick: bool, data_dir: Path | None) -> Case:
    model, tokenizer = load_pretrained("minilm")
    train, dev = load_sts("train", data_dir), load_sts("dev", data_dir)
    sentences = list(dict.fromkeys([*train.first, *train.second]))[: 512 if quick else SENTENCES]
    return Case(
        "all-MiniLM-L6-v2",
        model,
        as_batches(sentences, tokenizer, 128),
        f"{len(sentences)} sentences of STS-B train, without scores",
        f"STS-B dev, all {len(dev.scores)} pairs",
        {"name": "Spearman", "better": "higher"},
        lambda one: sts_spearman(one, tokenizer, dev),
    )


def _stories(quick: bool, data_dir: Path | None) -> Case:
    subject = stories_subject(quick, data_dir)
    return Case(
        subject.name,
        subject.model,
        as_batches(subject.calibration),
        f"{len(subject.calibration)} windows of {subject.calibration.shape[1]} tokens that the model tells",
        f"{len(subject.evaluation)} other stories that the model tells",
        {"name": "perplexity", "better": "lower"},
        lambda one: perplexity(one, subject.evaluation).perplexity,
    )


def _smollm(quick: bool, data_dir: Path | None) -> Case:
    model, tokenizer = load_pretrained("smollm2-135m")

    def windows(name: str, count: int) -> Tensor:
        return token_windows(tokenizer, load_text(name, data_dir), 512, count)

    evaluation = windows("wikitext2:evaluation", 4 if quick else 32)
    calibration = windows("wikitext2:calibration", 8 if quick else 64)
    return Case(
        "SmolLM2-135M-Instruct, from a file of 4 bits",
        model,
        as_batches(calibration),
        f"{len(calibration)} windows of 512 tokens",
        f"{len(evaluation)} windows of the other half of the articles",
        {"name": "perplexity", "better": "lower"},
        lambda one: perplexity(one, evaluation).perplexity,
    )
