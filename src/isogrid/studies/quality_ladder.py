"""The ladder of one-shot compression: plain, whitened, anchored, + allocation, + refinement, + distillation.

Each rung adds one step to the one before, for every format, beside the best published recipe (AA-SVD: low rank on the
original inputs, equal ratios, block refinement) run by the same code on the same windows. Every row is also measured on
a text of another domain that is never calibrated on.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.checkpoint import load, save
from isogrid.compress import (
    AUTO,
    Distillation,
    Moments,
    Refinement,
    as_batches,
    collect_moments,
    compress,
    dense_parameters,
    distill,
    select_layers,
    stored_bytes,
)
from isogrid.data import load_pretrained, load_stories260k, load_text, token_windows
from isogrid.errors import IsogridError
from isogrid.evaluation import forget_peak_memory, peak_memory_bytes, perplexity
from isogrid.report import progress, write_report
from isogrid.studies.rows import Say, gap, heading, remembered, row_of, stored_row, unmistakable

ALLOCATED, REFINED, DISTILLED = "+ allocation", "+ refinement", "+ distillation"
RUNGS = ("plain", "whitened", "anchored", ALLOCATED, REFINED, DISTILLED)
RECIPE = "AA-SVD recipe"
WELORE = ("plain", "WeLore", "whitened", "WeLore, whitened")
PARTS = ("formats", "steps", "stories", "auto", "welore")
NAMES = {
    "low_rank": "Low rank",
    "low_rank_light": "Low-Rank Light",
    "blast": "BLAST",
    "monarch": "Monarch",
    "block_tensor_train": "Block Tensor-Train",
    "block_dense": "BlockDense",
    "kronecker": "Kronecker",
    "tensor_train": "Tensor train",
    "block_tensor_chain": "Block tensor chain",
    "block_diagonal": "Block-diagonal",
    "auto": "Auto",
}
FIRST = ("low_rank", "low_rank_light", "blast", "monarch", "block_tensor_train", "block_dense")
# Half-way between the layers' own matrices and the original outputs: as good on the calibration's own domain as all the
# way, and better on others.
ANCHOR = 0.5
KEEP = 0.6
FAST = {"monarch": {"sweeps": 2}, "block_tensor_train": {"sweeps": 2}}


@dataclass(frozen=True)
class Rung:
    """One row: a format at a size, climbed so far."""

    format: str
    keep: float
    rung: str

    @property
    def key(self) -> str:
        """Name of the stored row."""
        return f"{self.format}-{self.keep:g}-{self.rung.replace('+ ', '')}".replace(" ", "_")

    @property
    def label(self) -> str:
        """Name in tables."""
        return RECIPE if self.rung == RECIPE else NAMES[self.format]


@dataclass(frozen=True)
class Subject:
    """The model of a part, with its windows."""

    name: str
    model: nn.Module
    calibration: Tensor
    evaluation: Tensor
    other: Tensor
    refinement: Refinement
    distillation: Distillation


def rungs_of(part: str, *, full: bool, quick: bool, keep: float = KEEP) -> list[Rung]:
    """The rows of a part at a size, in the order they are measured.

    Raises:
        IsogridError: unknown part.
    """
    every = tuple(name for name in NAMES if name != "auto")
    if part == "formats":
        names = every if full else FIRST[:2] if quick else FIRST
        return [Rung(name, keep, rung) for name in names for rung in RUNGS[:3]]
    if part == "steps":
        names = ("low_rank_light", *(("low_rank", "blast", "block_dense") if full else ()))
        uniform = [Rung(name, keep, "whitened") for name in FIRST[:2]] + [Rung("low_rank", keep, RECIPE)]
        return uniform + [Rung(name, keep, rung) for name in names for rung in RUNGS[3:]]
    if part == "stories":
        return [Rung(name, keep, rung) for name in (FIRST[:2] if quick else every) for rung in RUNGS] + [
            Rung("low_rank", keep, RECIPE)
        ]
    if part == "auto":
        return [Rung(name, keep, ALLOCATED) for name in ("auto", *AUTO)]
    if part == "welore":
        names = ("low_rank", "low_rank_light") if full else ("low_rank_light",)
        return [Rung(name, keep, rung) for name in names for keep in (0.9, 0.8, 0.7, 0.6) for rung in WELORE]
    raise IsogridError(f"quality_ladder has the parts {', '.join(PARTS)}; got {part!r}")


def run_quality_ladder(
    out: Path,
    *,
    part: str = "formats",
    methods: Sequence[str] = (),
    keep: float | None = None,
    full: bool = False,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study quality_ladder",
    say: Say = print,
) -> dict[str, Any]:
    """One part of the ladder.

    Args:
        out: folder; the part's table is written to ``out/part``, at another size than 0.6 to ``out/part-0.8``. Rows
            are kept in ``runs`` and not measured again.
        part: "formats", the first three rungs of the formats; "steps", the last rungs of Light beside equal ratios and
            the published recipe; "stories", every format over all rungs on the smallest model; "auto", a format for
            each layer beside each format for all, there too; "welore", WeLore's threshold beside equal ratios.
        methods: only these formats, and the published recipe.
        keep: share of the parameters kept, 0.6 by default; "welore" has sizes of its own.
        full: all formats, "auto" on the larger model, and the best four for "steps": several hours.
        quick: few windows and formats.
        seed: of fits and training.
        data_dir: where WikiText-2 is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.
    """
    if keep is not None and part == "welore":
        raise IsogridError(f"welore has sizes of its own, got keep={keep:g}; leave it out")
    if keep is not None and not 0 < keep < 1:
        raise IsogridError(f"keep is a share in (0, 1), got {keep:g}")
    rungs = rungs_of(part, full=full, quick=quick, keep=KEEP if keep is None else keep)
    unknown = sorted({*methods} - {one.format for one in rungs})
    if unknown:
        raise IsogridError(f"{part} has no row of {unknown[0]!r}; it has {', '.join({one.format: 0 for one in rungs})}")
    rungs = [one for one in rungs if not methods or one.format in methods or one.rung == RECIPE]
    each = {"formats": 3, "steps": 10, "stories": 0.15, "auto": 11 if full else 2, "welore": 1.5}[part]
    minutes = each * len(rungs) * (0.2 if quick else 1)
    say(f"{len(rungs)} rows; about {minutes:.0f} minutes on two cores, less for rows that are there already")
    small = part == "stories" or (part == "auto" and not full)
    subject = stories_subject(quick, data_dir) if small else _smollm(quick, data_dir)
    settings: dict[str, Any] = {
        "calibration": f"{len(subject.calibration)} windows of {subject.calibration.shape[1]} tokens",
        "evaluation": f"{len(subject.evaluation)} windows of the other half of the articles",
        "other domain": f"{len(subject.other)} windows of Python's documentation, never calibrated on",
        "anchor": ANCHOR,
        "refinement": _spelled(subject.refinement),
        "distillation": _spelled(subject.distillation),
        "seed": seed,
    }
    if small:
        settings["evaluation"] = f"{len(subject.evaluation)} other stories that the model tells"
    runs = Path("runs/study/quality_ladder") / part
    moments: Moments | None = None

    def measured(model: nn.Module) -> dict[str, Any]:
        return {
            "quality": perplexity(model, subject.evaluation).perplexity,
            "other_quality": perplexity(model, subject.other).perplexity,
        }

    def kept(one: Rung) -> Path:
        return runs / unmistakable(one.key, settings)

    def dense_row() -> dict[str, Any]:
        return {
            "label": "Dense",
            "format": "dense",
            "achieved_keep": 1.0,
            "parameters": dense_parameters(select_layers(subject.model)),
            "bytes": stored_bytes(subject.model),
            **measured(subject.model),
        }

    dense = remembered(runs, "dense", settings, dense_row)
    say(f"dense: perplexity {dense['quality']:.2f}, other domain {dense['other_quality']:.2f}")

    def row(one: Rung) -> dict[str, Any]:
        nonlocal moments
        if "whitened" not in one.rung:
            moments = None  # they weigh more than the model
        if "whitened" in one.rung and moments is None:
            moments = collect_moments(subject.model, select_layers(subject.model), subject.calibration)
        if one.rung == DISTILLED:
            return distilled(one)
        forget_peak_memory()
        smaller = copy.deepcopy(subject.model)
        with progress(f"{one.label} {one.rung}", len(select_layers(smaller))) as step:
            report = compress(
                smaller,
                one.format,
                keep=one.keep,
                seed=seed,
                on_layer=lambda layer: step(layer.name),
                **_arguments(one, subject, moments),
            )
        found = row_of(report, one.label, calibrated="calibration" in _arguments(one, subject, moments))
        found |= measured(smaller)
        found["rung"] = one.rung
        found["gap"] = gap(found["quality"], dense["quality"])
        found["predicted_rise"], found["least_rise"] = report.predicted_rise, report.least_rise
        found["blocks"] = [block.to_dict() for block in report.blocks]
        found["peak_memory"] = peak_memory_bytes()
        if one.rung == REFINED:
            save(smaller, kept(one))  # the next rung begins here
        return found

    def distilled(one: Rung) -> dict[str, Any]:
        """The rung before, and one step more: what `compress` does with ``refine`` and ``distill`` together."""
        before = dataclasses.replace(one, rung=REFINED)
        found = dict(remembered(runs, before.key, settings, partial(row, before)))
        if not kept(before).is_dir():  # the row came without its model
            found = stored_row(runs, before.key, settings, row(before))
        forget_peak_memory()
        smaller = load(kept(before)).eval()
        batches = as_batches(subject.calibration, training=True)
        reached = distill(smaller, subject.model, batches, subject.distillation, seed=seed)
        found |= measured(smaller) | {"rung": one.rung, "distilled": dict(vars(reached))}
        found["gap"] = gap(found["quality"], dense["quality"])
        found["seconds"] += reached.seconds
        found["peak_memory"] = peak_memory_bytes()
        return found

    rows = []
    for one in rungs:
        rows.append(remembered(runs, one.key, settings, partial(row, one)))
        last = rows[-1]
        say(
            f"{one.label}, {one.rung}, keep {one.keep:g}: perplexity {last['quality']:.4g}, other domain "
            f"{last['other_quality']:.4g}, gap {last['gap']:.3f}, {last['seconds'] / 60:.1f} min"
        )
    result = {
        **heading(f"The ladder on {subject.name}: {part}", command, settings, model=subject.name),
        "quality": {"name": "perplexity", "better": "lower"},
        "other_quality": {"name": "other domain"},
        "dense": dense,
        "rows": rows,
        "notes": [
            "Each rung adds to the one before: whitened fits know the original model's inputs; anchored ones aim at "
            "its outputs from the compressed part's inputs; allocation spends one budget by sensitivity; refinement "
            "trains block by block; distillation the whole model.",
            "The published recipe: low rank on the original inputs, equal ratios, the same refinement.",
            "Perplexities can't be compared with published ones.",
            *_of_uniform(rows),
        ],
    }
    write_report(result, out / (part if keep in (None, KEEP) else f"{part}-{keep:g}"))
    return result


def _of_uniform(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The gap of the best row, as a part of those it is to beat."""
    best = min(rows, key=lambda row: row["gap"])
    beaten = [row for row in rows if row["rung"] in ("whitened", RECIPE) and row["format"] in FIRST[:2]]
    if best in beaten:
        return []
    parts = [
        f"{best['gap'] / row['gap']:.2f} of {row['label']}" + ("" if row["rung"] == RECIPE else f", {row['rung']}")
        for row in beaten
        if row["gap"] > 0
    ]
    return [f"The least gap, {best['gap']:.3f} ({best['label']}, {best['rung']}): {'; '.join(parts)}."] if parts else []


def _arguments(one: Rung, subject: Subject, moments: Moments | None) -> dict[str, Any]:
    """What `compress` is told on a rung."""
    options: dict[str, Any] = {"allocate": "welore"} if "WeLore" in one.rung else {}
    if one.rung in ("plain", "WeLore"):
        return options
    options |= FAST.get(one.format, {})
    if "whitened" in one.rung:
        return options | {"calibration": moments}
    options["calibration"] = subject.calibration
    if one.rung == RECIPE:
        return options | {"inputs": "original", "refine": subject.refinement}
    options["anchor"] = ANCHOR
    if one.rung == "anchored":
        return options
    options["allocate"] = "global"
    if one.rung == REFINED:
        options["refine"] = subject.refinement
    return options


def _smollm(quick: bool, data_dir: Path | None) -> Subject:
    model, tokenizer = load_pretrained("smollm2-135m")
    windows = partial(_windows, tokenizer, data_dir, 512)
    return Subject(
        "SmolLM2-135M-Instruct",
        model,
        windows("wikitext2:calibration", 8 if quick else 64),
        windows("wikitext2:evaluation", 4 if quick else 32),
        windows("pydoc", 4 if quick else 16),
        Refinement(steps=20 if quick else 200),
        Distillation(steps=10 if quick else 100),
    )


def stories_subject(quick: bool, data_dir: Path | None) -> Subject:
    """The smallest model writes its calibration and evaluation text itself: the text it was trained on is not here."""
    model, tokenizer = load_stories260k(data_dir)
    told = _told_stories(model, tokenizer.bos_token_id, 24 if quick else 192)
    cut = len(told) * 2 // 3
    return Subject(
        "stories260k",
        model,
        told[:cut],
        told[cut:],
        token_windows(tokenizer, load_text("pydoc"), 256, 8 if quick else 32),
        Refinement(steps=50 if quick else 200, rate=0.01, rows=1024),
        Distillation(steps=50 if quick else 200, rate=0.005, rows=1024),
    )


def _told_stories(model: Any, start: int, count: int) -> Tensor:
    """Windows ``(count, 256)`` sampled from the model at temperature 1, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begin = torch.full((count, 1), start)
        seen = torch.ones_like(begin)
        told: Tensor = model.generate(
            begin,
            attention_mask=seen,
            max_length=256,
            min_length=256,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=start,
        )
    return told


def _windows(tokenizer: Any, data_dir: Path | None, length: int, name: str, count: int) -> Tensor:
    return token_windows(tokenizer, load_text(name, data_dir), length, count)


def _spelled(tuning: Refinement | Distillation) -> str:
    return f"{tuning.steps} steps of {tuning.rows} tokens, rate {tuning.rate:g}, {tuning.held_out:g} held out"
