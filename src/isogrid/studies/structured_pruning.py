"""Structured pruning to speedups: asked for, predicted and measured, beside uniform widths and magnitudes.

Pruning asks how much of a model is needed for a time, and how the time is measured is half of the answer: all speeds
are medians of passes of the pruned and the dense model in turns, after the tables that the sizes were chosen by.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isogrid.checkpoint import load, save
from isogrid.compress import count_parameters, dense_parameters, select_layers, stored_bytes
from isogrid.compress.milliseconds import measured_together
from isogrid.compress.structured_pruning import How, Pruner, PruningReport, prune_family
from isogrid.data import load_pretrained
from isogrid.errors import IsogridError
from isogrid.report import write_report
from isogrid.studies.rows import Say, gap, heading, remembered
from isogrid.studies.subjects import Yardstick, calibration_data, figure_of, timed_inputs

SPEEDUPS = (1.25, 1.5, 2.0)
# The speedup at which other ways are compared.
BESIDE = 1.5
REPEATS = 31


@dataclass(frozen=True)
class Part:
    """A model, its data, and the pass that is to be fast.

    Attributes:
        model: name of `load_pretrained`.
        name: for the page.
        calibration: see `calibration_data`.
        windows: of it; the same with ``quick``.
        rows, tokens: of the timed batch.
        minutes: of distillation after each step of the gradual way, and with ``full``; 0: it is not gone.
        takes: minutes of all of it on two cores, without distillation.
    """

    model: str
    name: str
    calibration: str
    windows: tuple[int, int]
    rows: int
    tokens: int
    minutes: tuple[float, float]
    takes: int


PARTS = {
    "encoder": Part("minilm", "all-MiniLM-L6-v2", "sts:train", (128, 8), 8, 64, (4.0, 15.0), 10),
    "decoder": Part("smollm2-135m", "SmolLM2-135M-Instruct", "wikitext2:calibration", (64, 8), 1, 256, (0.0, 15.0), 60),
}


@dataclass(frozen=True)
class Way:
    """How a model is pruned in one shot."""

    key: str
    label: str
    criterion: str
    allocate: str


OURS = Way("search", "ZipLM", "obs", "search")
OTHERS = (
    Way("errors", "ZipLM, sizes by errors alone", "obs", "errors"),
    Way("uniform", "Uniform widths, refitted", "obs", "uniform"),
    Way("magnitude_uniform", "Uniform widths by magnitude", "magnitude", "uniform"),
    Way("magnitude", "Heads and channels by magnitude", "magnitude", "errors"),
)


def run_structured_pruning(
    out: Path,
    *,
    part: str = "encoder",
    full: bool = False,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study structured_pruning",
    say: Say = print,
) -> dict[str, Any]:
    """One model at three speedups, at one of them by other ways too, and where training is asked for, gradually.

    Args:
        out: folder; the table is written to ``out/part``. Rows and the three models of the family are kept in
            ``runs/study/structured_pruning``.
        part: "encoder", all-MiniLM-L6-v2 on STS-B, with distillation; "decoder", SmolLM2 on WikiText-2.
        full: longer distillation, and of the decoder too.
        quick: less calibration, fewer passes, trials and minutes.
        seed: of searches and training.
        data_dir: where data is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.

    Raises:
        IsogridError: unknown part.
    """
    if part not in PARTS:
        raise IsogridError(f"structured_pruning has the parts {', '.join(PARTS)}; got {part!r}")
    one = PARTS[part]
    minutes = min(0.05, one.minutes[0]) if quick else one.minutes[full]
    trained = 2 * len(SPEEDUPS) * minutes
    say(f"about {trained + (2 if quick else one.takes):.0f} minutes on two cores, less for rows that are there already")
    study = _Study(one, minutes, quick, seed, data_dir, Path("runs/study/structured_pruning") / part, say)
    dense, rows = study.dense, study.rows()
    result = {
        **heading(f"Structured pruning: {one.name}", command, study.settings, model=one.name),
        "quality": {"name": study.figure, "better": study.better},
        "dense": dense,
        "rows": rows,
        "notes": [*_findings(rows, study.figure), *_notes(study)],
    }
    write_report(result, out / part)
    return result


class _Study:
    """The rows of one part; what they share is made when the first row needs it."""

    def __init__(
        self, part: Part, minutes: float, quick: bool, seed: int, data_dir: Path | None, runs: Path, say: Say
    ) -> None:
        self.part, self.minutes, self.seed, self.runs, self.say = part, minutes, seed, runs, say
        self.windows, self.trials, self.repeats = part.windows[quick], 2 if quick else 32, 5 if quick else REPEATS
        self.data_dir = data_dir
        self.yardstick = Yardstick(windows=4 if quick else 32, data_dir=data_dir)
        self.settings: dict[str, Any] = {
            "calibration": f"{part.calibration}, {self.windows} windows",
            "timed": f"{part.rows} x {part.tokens} tokens, {torch.get_num_threads()} threads",
            "repeats": self.repeats,
            "trials": self.trials,
            "minutes": minutes,
            "seed": seed,
        }
        self.dense = remembered(runs, "dense", self.settings, self._dense_row)
        self.figure, self.better = self.dense["figure"], self.dense["better"]

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load_pretrained(self.part.model)

    @cached_property
    def data(self) -> Any:
        model, tokenizer = self.loaded
        return calibration_data(
            self.part.calibration, model, tokenizer, windows=self.windows, length=512, data_dir=self.data_dir
        )

    @cached_property
    def inputs(self) -> Any:
        return timed_inputs(self.loaded[0], self.part.tokens, self.part.rows)

    @cached_property
    def pruner(self) -> Pruner:
        # One table of times for all rows.
        return Pruner(self.loaded[0], self.data, **self.options)

    @cached_property
    def by_magnitude(self) -> Pruner:
        return self.pruner.otherwise(How(criterion="magnitude"))

    @property
    def options(self) -> dict[str, Any]:
        """Of pruners; a table of times is measured anew, beside nothing else."""
        return {"inputs": self.inputs, "tokenizer": self.loaded[1], "seed": self.seed, "say": self.say, "cached": False}

    def rows(self) -> list[dict[str, Any]]:
        """All rows; those that are kept are read."""
        found = [self._row(f"{OURS.key}-{speedup:g}", partial(self._one_shot, OURS, speedup)) for speedup in SPEEDUPS]
        found += [self._row(f"{way.key}-{BESIDE:g}", partial(self._one_shot, way, BESIDE)) for way in OTHERS]
        if self.minutes:
            found.append(self._row("trained", self._trained))
            gradual = remembered(self.runs, "gradual", self.settings, self._gradual)["rows"]
            found += gradual
            for row in gradual:
                self.say(_line(row, self.figure))
        return found

    def _row(self, key: str, make: Any) -> dict[str, Any]:
        row = remembered(self.runs, key, self.settings, make)
        self.say(_line(row, self.figure))
        return row

    def _dense_row(self) -> dict[str, Any]:
        model, tokenizer = self.loaded
        figure, value, better = figure_of(self.yardstick.measure(model, tokenizer, self.part.name))
        return {
            "label": "Dense",
            "format": "dense",
            "calibrated": False,
            "achieved_keep": 1.0,
            "parameters": dense_parameters(select_layers(model)),
            "bytes": stored_bytes(model),
            "latency_ratio": 1.0,
            "quality": value,
            "figure": figure,
            "better": better,
        }

    def _one_shot(self, way: Way, speedup: float) -> dict[str, Any]:
        begun = time.perf_counter()
        pruner = self.pruner if way.criterion == "obs" else self.by_magnitude
        smaller = copy.deepcopy(self.loaded[0])
        chosen = pruner.choose(speedup, allocate=way.allocate, trials=self.trials)
        report = pruner.apply(chosen, speedup, smaller)
        report.milliseconds = measured_together({"dense": self.loaded[0], "pruned": smaller}, self.inputs, self.repeats)
        row = self._described(f"{way.label} {speedup:g}×", smaller, report, time.perf_counter() - begun)
        if way is OURS:
            row["reloaded"] = self._reloaded(smaller, f"{speedup:g}x")
        return row

    def _trained(self) -> dict[str, Any]:
        """One shot to the last speedup, and as many minutes of training as all steps of the gradual way."""
        ((model, report),) = self._family(SPEEDUPS[-1:], len(SPEEDUPS) * self.minutes, gradual=False)
        return self._described(f"ZipLM {SPEEDUPS[-1]:g}×, then trained", model, report, report.seconds)

    def _gradual(self) -> dict[str, Any]:
        return {
            "rows": [
                self._described(f"ZipLM, gradually to {report.speedup:g}×", model, report, report.seconds)
                for model, report in self._family(SPEEDUPS, self.minutes, gradual=True)
            ]
        }

    def _family(self, speedups: Sequence[float], minutes: float, *, gradual: bool) -> Any:
        return prune_family(
            self.loaded[0],
            self.data,
            speedups=speedups,
            gradual=gradual,
            trials=self.trials,
            train=minutes,
            times=self.pruner.times,
            checks=self.pruner.checks,
            repeats=self.repeats,
            **self.options,
        )

    def _described(self, label: str, model: nn.Module, report: PruningReport, seconds: float) -> dict[str, Any]:
        assert report.milliseconds is not None
        dense, pruned = report.milliseconds["dense"], report.milliseconds["pruned"]
        _, value, _ = figure_of(self.yardstick.measure(model, self.loaded[1], self.part.name))
        gone = count_parameters(self.loaded[0]) - report.parameters
        row = {
            "label": label,
            "format": "dense, pruned",
            "calibrated": True,
            "achieved_keep": 1 - gone / self.dense["parameters"],
            "parameters": self.dense["parameters"] - gone,
            "bytes": report.bytes,
            "quality": value,
            "requested_speedup": report.speedup,
            # Of a model that was pruned before, too, times are those of the dense one's table.
            "predicted_speedup": report.predicted,
            "latency_ms": pruned.median,
            "quartiles": [pruned.lower, pruned.upper],
            "latency_ratio": dense.median / pruned.median,
            "change": report.loss,
            "modules": {module.name: [module.kept, module.of] for module in report.modules},
            "seconds": seconds,
            "warnings": report.warnings,
        }
        if report.distilled is not None:
            row["distilled"] = dict(vars(report.distilled))
        if self.figure == "perplexity":
            row["gap"] = gap(value, self.dense["quality"])
        return row

    def _reloaded(self, model: nn.Module, name: str) -> bool:
        """Whether a model that is written and read again gives the same numbers."""
        again = load(save(model, self.runs / "models" / name, tokenizer=self.loaded[1]))
        with torch.no_grad():
            pairs = zip(model(self.inputs).values(), again(self.inputs).values(), strict=True)
            return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _line(row: Mapping[str, Any], figure: str) -> str:
    return (
        f"{row['label']}: predicted {row['predicted_speedup']:.3f}, measured {row['latency_ratio']:.3f}; "
        f"{figure} {row['quality']:.4g}"
    )


def _findings(rows: Sequence[Mapping[str, Any]], figure: str) -> list[str]:
    """What the rows say of each other, in numbers."""
    by_label = {row["label"]: row for row in rows}
    ours = by_label[f"{OURS.label} {BESIDE:g}×"]
    beside = ", ".join(
        f"{row['quality']:.4g} ({way.label})"
        for way in OTHERS
        if (row := by_label.get(f"{way.label} {BESIDE:g}×")) is not None
    )
    off = max(abs(row["latency_ratio"] / row["predicted_speedup"] - 1) for row in rows)
    said = [
        f"At {BESIDE:g}×: {figure} {ours['quality']:.4g} beside {beside}.",
        f"Measured speeds are off the predicted ones by {off:.1%} at most.",
    ]
    curve = [(row["latency_ratio"], row["quality"]) for row in rows if "reloaded" in row]
    at_equal = [
        f"{found:.4g} where {way.label} stands at {row['quality']:.4g} ({row['latency_ratio']:.2f}×)"
        for way in OTHERS
        if (row := by_label.get(f"{way.label} {BESIDE:g}×")) is not None
        and (found := _between(curve, row["latency_ratio"], logarithmic=figure == "perplexity")) is not None
    ]
    if at_equal:
        said.append(f"At equal measured speed, {OURS.label} interpolated between its own rows: {'; '.join(at_equal)}.")
    family = [row for row in rows if "reloaded" in row]
    same = sum(bool(row["reloaded"]) for row in family)
    said.append(f"{same} of {len(family)} models of one run were written, read again and gave the same numbers.")
    last = f"{SPEEDUPS[-1]:g}×"
    gradual = by_label.get(f"ZipLM, gradually to {last}")
    if gradual is not None:
        one_shot, trained = by_label[f"{OURS.label} {last}"], by_label[f"ZipLM {last}, then trained"]
        said.append(
            f"At {last}: {figure} {gradual['quality']:.4g} gradually, {trained['quality']:.4g} in one shot with as "
            f"many minutes of training, {one_shot['quality']:.4g} in one shot."
        )
    return said


def _between(points: Sequence[tuple[float, float]], at: float, *, logarithmic: bool) -> float | None:
    """The value between two measured points, or their logarithms'; None outside of them."""
    for (low, before), (high, after) in itertools.pairwise(sorted(points)):
        if low <= at <= high and high > low:
            place = (at - low) / (high - low)
            if logarithmic:
                return math.exp((1 - place) * math.log(before) + place * math.log(after))
            return (1 - place) * before + place * after
    return None


def _notes(study: _Study) -> list[str]:
    notes = [
        "ZipLM: the optimal brain surgeon's order; sizes by what the model says of its modules, searched. "
        "Without refits: columns as they were.",
        "The first row's time counts calibration and the table of times.",
    ]
    if study.minutes:
        notes.append(
            f"Trained without labels, towards the dense model's outputs and each token's hidden states, "
            f"{study.minutes:g} minutes after each speedup."
        )
    return notes
