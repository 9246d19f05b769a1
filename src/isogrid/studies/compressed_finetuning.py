"""Fine-tuning what is compressed: DSFormer's factors and its straight-through factorizer beside low rank, on SST-2.

Chand et al. 2023 compress text encoders at two to three and a half times and tune them on a task. Here an encoder is
tuned on SST-2 dense; then every method starts from it, at equal bytes, and gets the same examples again, as many
updates, and the same grid of learning rates, chosen from by examples held out. At the end the factors of each are
written as trit planes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from isogrid.compress import collect_moments, select_layers
from isogrid.data import LabelledTexts, load_pretrained, load_sst2
from isogrid.errors import IsogridError
from isogrid.fitting import Metric
from isogrid.formats import Budget, DenseSparse, Format, Stored, TritPlanes, as_format
from isogrid.linear import StructuredLinear, linear_matrix
from isogrid.models import SentenceClassifier
from isogrid.report import format_duration, progress
from isogrid.studies.finetuning_run import Plan, batches, encoded, evaluate
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table
from isogrid.training.factored import trainable
from isogrid.training.straight_through import refresh_factors, settle_factors, straight_through

MODEL = "minilm"
STORED = torch.bfloat16
CODES = TritPlanes(planes=2)
# How many times fewer bytes, codes and masks included.
FACTORS = (2.0, 2.8)


@dataclass(frozen=True)
class Way:
    """How the matrices are rewritten and tuned."""

    label: str
    format: str
    straight_through: bool = False


WAYS = {
    "low_rank_light": Way("Low-Rank Light, whitened", "low_rank_light"),
    "dense_sparse": Way("DSFormer, whitened", "dense_sparse"),
    "straight_through": Way("DSFormer, straight-through", "dense_sparse", straight_through=True),
}


@dataclass(frozen=True)
class Course:
    """What all runs share.

    Attributes:
        examples: of the training part.
        held: of the dev part, which choose the learning rate.
        task_epochs: passes of the dense model over the examples.
        epochs: passes of each method, from there.
        rates: learning rates, each decaying by a cosine.
        refresh: steps between refits of factors behind the straight-through layers.
        settle: share of the steps after which the factors alone are tuned.
        rounds: of DSFormer's first fit, at most.
        layers: so many are rewritten; None: all.
        length: most tokens of an example.
    """

    examples: int = 4000
    held: int = 500
    task_epochs: int = 2
    epochs: int = 1
    rates: tuple[float, ...] = (1e-4, 3e-4)
    refresh: int = 4
    settle: float = 0.7
    rounds: int = 20
    layers: int | None = None
    length: int = 64


def run_compressed_finetuning(
    out: Path,
    *,
    quick: bool = False,
    full: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    methods: tuple[str, ...] = (),
    command: str = "isogrid study compressed_finetuning",
    say: Say = print,
) -> dict[str, Any]:
    """DSFormer and low rank at two sizes, tuned on SST-2, then as trit planes.

    Args:
        out: folder for ``table.md`` and ``data.json``. Runs are kept in ``runs/study/compressed_finetuning``.
        quick: 64 examples, one size, two layers.
        full: all examples, three epochs.
        seed: of the head, the order, dropout and fits.
        data_dir: where SST-2 is looked up first.
        methods: keys of `WAYS`; all by default.
        command: the command line, for the page.
        say: told each run.

    Returns:
        The table.

    Raises:
        IsogridError: an unknown method.
    """
    chosen = list(methods) or list(WAYS)
    for name in chosen:
        if name not in WAYS:
            raise IsogridError(f"method {name!r} is unknown; there are {', '.join(WAYS)}")
    course, factors = Course(), list(FACTORS)
    if full:
        course = replace(course, examples=10**9, task_epochs=3, epochs=3)
    if quick:
        course, factors = (
            Course(examples=64, held=32, task_epochs=1, rates=(3e-4,), refresh=1, rounds=0, layers=2),
            [FACTORS[0]],
        )
    texts = _Texts.load(course, data_dir, 16 if quick else None, seed)
    settings = {**asdict(course), "examples": len(texts.train), "seed": seed, "tests": len(texts.test)}
    folder = Path("runs/study/compressed_finetuning")
    planned = [(factor, way, rate) for factor in factors for way in chosen for rate in course.rates]
    steps = len(texts.train) // Plan().batch
    say(f"{len(planned)} runs of {steps * course.epochs} steps; about {format_duration(2.0 * steps * len(planned))}")
    task = _Task(texts, course, seed, folder, settings)
    dense = remembered(folder, "dense", settings, task.train)
    say(f"dense: loss {dense['loss']:.4f}, accuracy {dense['accuracy']:.4f}")
    rows = []
    with progress("Tuning", len(planned)) as step:
        for factor, way, rate in planned:
            key = f"{way}-{factor:g}-{rate:g}"
            row = remembered(folder, key, settings, partial(task.compressed, way, factor, rate))
            rows.append(row)
            step(key)
            say(
                f"{key}: held loss {row['held_loss']:.4f}, loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}; "
                f"trit planes {row['coded']['accuracy']:.4f}"
            )
    best = [
        min((row for row in rows if (row["way"], row["factor"]) == kind), key=lambda row: float(row["held_loss"]))
        for kind in dict.fromkeys((row["way"], row["factor"]) for row in rows)
    ]
    result = {
        **heading(f"Compressed, then tuned on SST-2: {MODEL}", command, settings, model=MODEL),
        "dense": dense,
        "rows": rows,
        "best": best,
    }
    return write_table(result, _page(result), out)


@dataclass(frozen=True)
class _Texts:
    """Examples to train on, to choose learning rates by, and to judge by."""

    train: LabelledTexts
    held: LabelledTexts
    test: LabelledTexts

    @classmethod
    def load(cls, course: Course, data_dir: Path | None, tests: int | None, seed: int) -> _Texts:
        draw = torch.Generator().manual_seed(seed)
        train, held, test = (load_sst2(part, data_dir) for part in ("train", "dev", "test"))
        return cls(
            train.sample(course.examples, draw),
            held.sample(course.held, draw),
            test if tests is None else test.sample(tests, draw),
        )


class _Task:
    """The tuned dense model, its layers and what these are given; all made when they are first needed."""

    def __init__(self, texts: _Texts, course: Course, seed: int, folder: Path, settings: Mapping[str, Any]) -> None:
        self.texts, self.course, self.seed, self.plan = texts, course, seed, Plan(length=course.length)
        self.encoder, self.tokenizer = load_pretrained(MODEL)
        self.layers = list(select_layers(self.encoder))[: course.layers]
        self.weights = folder / f"task-{settings['examples']}-{course.task_epochs}-{seed}.safetensors"
        self._metrics: dict[str, Metric] | None = None
        self._fitted: dict[tuple[str, float], dict[str, tuple[Format, dict[str, Tensor]]]] = {}

    def fresh(self) -> nn.Module:
        """The encoder as it comes, with a new head."""
        encoder = copy.deepcopy(self.encoder)
        draw = torch.Generator().manual_seed(self.seed)
        return SentenceClassifier(encoder, encoder.config.hidden_size, generator=draw)

    def train(self) -> dict[str, Any]:
        """Tune the dense model and keep it."""
        model = self.fresh()
        begun = time.perf_counter()
        self._tune(model, self.course.task_epochs, self.course.rates[0])
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        beside = self.weights.with_suffix(".partial")
        save_file(model.state_dict(), beside)
        beside.replace(self.weights)
        found = self._judged(model) | {"seconds": time.perf_counter() - begun}
        return found | {"coded": self._coded(model)}

    def model(self) -> nn.Module:
        """The tuned dense model."""
        if not self.weights.is_file():
            self.train()
        model = self.fresh()
        model.load_state_dict(load_file(self.weights))
        return model

    def compressed(self, way: str, factor: float, rate: float) -> dict[str, Any]:
        """A row: fit, tune, judge, write as trit planes, judge again."""
        made = WAYS[way]
        begun = time.perf_counter()
        model = self.model()
        fitted = self._fit(model, made.format, factor)
        after = self._into(model, made, fitted)
        untuned = self._judged(model)
        self._tune(model, self.course.epochs, rate, after)
        found = self._judged(model)
        sizes = [(fmt, *_shape(model.get_submodule(f"encoder.{name}"))) for name, (fmt, _) in fitted.items()]
        return {
            "way": way,
            "label": made.label,
            "factor": factor,
            "rate": rate,
            **found,
            "before_tuning": untuned,
            "share": _share(sizes),
            "seconds": time.perf_counter() - begun,
            "coded": self._coded(model),
        }

    def metrics(self, model: nn.Module) -> dict[str, Metric]:
        """Of the inputs of the layers, on the training examples."""
        moments = collect_moments(
            model, {name: model.get_submodule(f"encoder.{name}") for name in self.layers}, self._calibration()
        )
        return moments.metrics

    def _calibration(self) -> list[dict[str, Tensor]]:
        texts = self.texts.train.texts
        found = []
        for begin in range(0, len(texts), 64):
            ids, mask = encoded(texts[begin : begin + 64], self.tokenizer, self.plan.length)
            found.append({"input_ids": ids, "attention_mask": mask})
        return found

    def _fit(self, model: nn.Module, spelled: str, factor: float) -> dict[str, tuple[Format, dict[str, Tensor]]]:
        if (spelled, factor) not in self._fitted:
            if self._metrics is None:
                self._metrics = self.metrics(model)
            fitted: dict[str, tuple[Format, dict[str, Tensor]]] = {}
            for name in self.layers:
                weight = linear_matrix(model.get_submodule(f"encoder.{name}")).detach()
                m, n = weight.shape
                budget = Budget(bytes=int(m * n * STORED.itemsize / factor), dtype=STORED)
                fmt = as_format(spelled).sized(m, n, budget)
                draw = torch.Generator().manual_seed(self.seed)
                rounds = self.course.rounds
                effort: dict[str, Any] = {}
                if isinstance(fmt, DenseSparse):
                    effort = {"rounds": rounds, "alternations": min(rounds, 15)}
                fitted[name] = fmt, fmt.fit(weight, self._metrics[name], generator=draw, **effort)
            self._fitted[spelled, factor] = fitted
        return self._fitted[spelled, factor]

    def _into(
        self, model: nn.Module, way: Way, fitted: Mapping[str, tuple[Format, dict[str, Tensor]]]
    ) -> Callable[[int, int], bool]:
        """Put factors in place; returns what to do after a step, which tells whether parameters are new."""
        if not way.straight_through:
            for name, (fmt, factors) in fitted.items():
                layer = model.get_submodule(f"encoder.{name}")
                copies = {key: value.clone() for key, value in factors.items()}
                bias = layer.bias.detach().clone() if isinstance(layer.bias, Tensor) else None
                new = StructuredLinear.from_factors(fmt, copies, *_shape(layer), bias=bias)
                model.set_submodule(f"encoder.{name}", new)
            return lambda step, steps: False
        assert self._metrics is not None
        for name, (fmt, factors) in fitted.items():
            metric = {f"encoder.{name}": self._metrics[name]}
            straight_through(model, fmt, metric, start={f"encoder.{name}": factors}, rounds=1)

        def after(step: int, steps: int) -> bool:
            last = round(self.course.settle * steps)
            if step < last and step % self.course.refresh == 0:
                refresh_factors(model)
            if step != last:
                return False
            refresh_factors(model)
            settle_factors(model)
            return True

        return after

    def _tune(
        self,
        model: nn.Module,
        epochs: int,
        rate: float,
        after: Callable[[int, int], bool] = lambda step, steps: False,
    ) -> None:
        torch.manual_seed(self.seed)
        model.train()
        steps = epochs * -(-len(self.texts.train) // self.plan.batch)
        optimizer = _adamw(model)
        step = 0
        for epoch in range(epochs):
            for ids, mask, labels in batches(self.texts.train, self.tokenizer, self.plan, 1000 * self.seed + epoch):
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                functional.cross_entropy(model(ids, mask), labels).backward()
                optimizer.step()
                step += 1
                if after(step, steps):
                    optimizer = _adamw(model)

    def _judged(self, model: nn.Module) -> dict[str, float]:
        held_loss, held = evaluate(model, self.texts.held, self.tokenizer, self.plan)
        loss, accuracy = evaluate(model, self.texts.test, self.tokenizer, self.plan)
        return {"held_loss": held_loss, "held_accuracy": held, "loss": loss, "accuracy": accuracy}

    @torch.no_grad()
    def _coded(self, model: nn.Module) -> dict[str, float]:
        """The model with its matrices or their factors as trit planes, not tuned again."""
        smaller = copy.deepcopy(model)
        sizes: list[tuple[Format, int, int]] = []
        metrics = self.metrics(smaller)
        for name in self.layers:
            layer = smaller.get_submodule(f"encoder.{name}")
            m, n = _shape(layer)
            bias = layer.bias if isinstance(layer.bias, nn.Parameter) else None
            draw = torch.Generator().manual_seed(self.seed)
            fmt: Format = CODES
            if isinstance(layer, StructuredLinear):
                fmt = coded = Stored(layer.format, CODES)
                inner = {key: value.detach() for key, value in layer.factors.items()}
                target, metric = layer.dense().detach(), metrics[name]
                factors = coded.written(inner, m, n, target=target, metric=metric, generator=draw, stored=STORED)
            else:
                factors = fmt.fit(linear_matrix(layer).detach(), metrics[name], generator=draw, stored=STORED)
            smaller.set_submodule(
                f"encoder.{name}", StructuredLinear.from_factors(fmt, factors, m, n, bias=bias).eval()
            )
            sizes.append((fmt, m, n))
        return self._judged(smaller) | {"share": _share(sizes)}


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([value for _, value in trainable(model)], lr=0.0, weight_decay=0.01)


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, StructuredLinear):
        return layer.out_features, layer.in_features
    m, n = linear_matrix(layer).shape
    return m, n


def _share(sizes: list[tuple[Format, int, int]]) -> float:
    """Bytes at 16-bit numbers over those of the dense matrices."""
    whole = sum(m * n * STORED.itemsize for _, m, n in sizes)
    return sum(fmt.cost(m, n, STORED).bytes for fmt, m, n in sizes) / whole


def _page(result: Mapping[str, Any]) -> str:
    head = "| Matrices | Bytes | Untuned accuracy | Learning rate | Loss | Accuracy | Time | As trit planes: bytes "
    lines = [head + "| Loss | Accuracy |", "| - | -: | -: | -: | -: | -: | -: | -: | -: | -: |"]
    dense = result["dense"]
    for row in (dense | {"label": "Dense", "share": 1.0, "rate": None, "before_tuning": None}, *result["best"]):
        coded, untuned = row["coded"], row["before_tuning"]
        lines.append(
            f"| {row['label']} | {100 * row['share']:.1f} % "
            f"| {'–' if untuned is None else format(untuned['accuracy'], '.3f')} "
            f"| {'–' if row['rate'] is None else format(row['rate'], 'g')} | {row['loss']:.3f} | {row['accuracy']:.3f} "
            f"| {format_duration(row['seconds'])} | {100 * coded['share']:.1f} % | {coded['loss']:.3f} "
            f"| {coded['accuracy']:.3f} |"
        )
    settings = result["settings"]
    words = (
        f"{settings['examples']} examples; the dense model is tuned for {settings['task_epochs']} epochs, each row for "
        f"{settings['epochs']} more from there, at the learning rate of {', '.join(map(str, settings['rates']))} with "
        f"the least loss on {settings['held']} held-out examples. Loss and accuracy on {settings['tests']} others. "
        "Bytes: of the encoder's matrices at 16-bit numbers, masks, codes and scales included. Straight-through: the "
        f"factors are fitted anew every {settings['refresh']} steps to a latent matrix; after "
        f"{100 * settings['settle']:.0f} % of the steps they alone are tuned. Trit planes: the factors in two planes, "
        "not tuned again."
    )
    return table_page(result, lines, words)
