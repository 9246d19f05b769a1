"""Whole models, end to end: a language model's prefill and its next token, an encoder's batch, beside the dense model.

Time depends on shapes alone: factors are random. All forms of a model run in turns in one process, layers in automatic
mode, after `isogrid tune` has measured them.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress import select_layers
from isogrid.data import load_pretrained
from isogrid.data.pretrained import quiet_transformers
from isogrid.errors import IsogridError
from isogrid.evaluation import interleaved_times, median_interval, ratio_interval, tune
from isogrid.formats import Budget, as_format
from isogrid.linear import StructuredLinear, linear_matrix, products
from isogrid.report import format_bytes
from isogrid.studies.layer_tables import table
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table

FORMATS = ("low_rank_light", "monarch(blocks=4)")
KEEP = 0.5
DTYPES = ("float32", "bfloat16")
PROMPT = 512
SENTENCES, LENGTH = 32, 64
# Passes with hooks, which tell how long the layers take.
WATCHED = 9

Run = Callable[[nn.Module], object]
Fresh = Callable[[], AbstractContextManager[object]]


def run_model_speed(
    out: Path,
    *,
    quick: bool = False,
    threads: Sequence[int] = (1,),
    repeats: int = 31,
    seed: int = 0,
    command: str = "isogrid bench --suite models",
    say: Say = print,
) -> dict[str, Any]:
    """Time two embedded models at half their parameters against themselves, in two dtypes.

    Args:
        out: folder for ``table.md`` and ``data.json``. Points are kept in ``runs/bench/models``.
        quick: the encoder in float32 alone, few repeats.
        threads: numbers of torch's threads.
        repeats: rounds.
        seed: of factors and tokens.
        command: for the page.
        say: told each row.

    Returns:
        The data.

    Raises:
        IsogridError: no number of threads, or one below 1; a model that is not installed.
    """
    if not threads or min(threads) < 1:
        raise IsogridError(f"threads are numbers of 1 and more, got {list(threads)}")
    points = [
        (name, dtype, task, count)
        for name, tasks in TASKS.items()
        for dtype in DTYPES
        for count in threads
        for task in tasks
        if not quick or (name == "minilm" and dtype == "float32")
    ]
    settings: dict[str, Any] = {
        "repeats": 5 if quick else repeats,
        "seed": seed,
        "products": products(),
        "formats": FORMATS,
    }
    say(f"{len(points)} points; about {max(len(points) * settings['repeats'] // 15, 1)} minutes")
    before = torch.get_num_threads()
    models: dict[tuple[str, str], Forms] = {}
    rows: list[dict[str, Any]] = []
    try:
        for name, dtype, task, count in points:
            torch.set_num_threads(count)
            make = partial(_measured, models, name, dtype, task, count, settings, say)
            key = f"{name}-{dtype}-{task}-{count}"
            with quiet_transformers():
                rows += remembered(Path("runs/bench/models"), key, settings, make)["rows"]
            for row in rows[-1 - len(FORMATS) :]:
                say(_line(row))
    finally:
        torch.set_num_threads(before)
    result = {**heading("Speed of models", command, settings), "rows": rows}
    write_table(result, _markdown(result), out)
    return result


@dataclass
class Forms:
    """A model and its structured forms, which share everything but the layers that are rewritten.

    Attributes:
        models: by label, "dense" first.
        layers: names of the rewritten layers.
        tuned: numbers of threads that layers have been measured on.
    """

    models: dict[str, nn.Module]
    layers: list[str]
    tuned: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, name: str, dtype: str, seed: int) -> Forms:
        """The dense model, and one with random factors for each format."""
        dense = load_pretrained(name, dtype=getattr(torch, dtype))[0].eval().requires_grad_(False)
        layers = select_layers(dense)
        source = torch.Generator().manual_seed(seed)
        forms: dict[str, nn.Module] = {"dense": dense}
        for spelled in FORMATS:
            shared: dict[int, Any] = {id(value): value for value in (*dense.parameters(), *dense.buffers())}
            form = copy.deepcopy(dense, shared)
            for place, layer in layers.items():
                matrix = linear_matrix(layer)
                m, n = matrix.shape
                new = StructuredLinear(
                    n,
                    m,
                    as_format(spelled).sized(m, n, Budget.keep(KEEP, m, n)),
                    bias=getattr(layer, "bias", None) is not None,
                    dtype=matrix.dtype,
                    generator=source,
                )
                form.set_submodule(place, new.eval().requires_grad_(False))
            forms[spelled] = form
        return cls(forms, list(layers))


def _measured(
    models: dict[tuple[str, str], Forms],
    name: str,
    dtype: str,
    task: str,
    threads: int,
    settings: Mapping[str, Any],
    say: Say,
) -> dict[str, Any]:
    if (name, dtype) not in models:
        models.clear()  # one at a time in memory
        models[name, dtype] = Forms.of(name, dtype, settings["seed"])
    forms = models[name, dtype]
    if threads not in forms.tuned:
        forms.tuned.add(threads)
        say(f"{name}, {dtype}: measuring its kinds of layers")
        for form in list(forms.models.values())[1:]:
            tune(form)
    rows, prepare = TASKS[name][task]
    runs: dict[str, Callable[[], object]] = {}
    within: dict[str, Fresh] = {}
    with torch.no_grad():
        for label, form in forms.models.items():
            run, within[label] = prepare(form, settings["seed"])
            runs[label] = partial(run, form)
        times = interleaved_times(runs, repeats=settings["repeats"], within=within)
        inside = {
            label: _inside(form, forms.layers, runs[label], within[label]) for label, form in forms.models.items()
        }
    found = []
    for label, form in forms.models.items():
        layers = [form.get_submodule(place) for place in forms.layers]
        structured = [layer for layer in layers if isinstance(layer, StructuredLinear)]
        promise = _promise(structured, rows) if structured else 1.0
        outside = 1 - inside["dense"]
        found.append(
            {
                "model": name,
                "dtype": dtype,
                "task": task,
                "threads": threads,
                "form": label,
                "ms": vars(median_interval(times[label])),
                "ratio": vars(ratio_interval(times[label], times["dense"])),
                "outside": 1 - inside[label],
                "promise": 1 / (outside + inside["dense"] / promise),
                "layers": len(layers),
                "planned dense": sum(layer.plan(rows) == "dense" for layer in structured),
                "kept dense": sum(layer.memory()["dense view"] for layer in structured),
            }
        )
    return {"rows": found}


def _promise(layers: Sequence[StructuredLinear], rows: int) -> float:
    """How many times fewer operations the layers take together; at one row, bytes."""
    if rows == 1:
        whole = sum(layer.in_features * layer.out_features * layer.floating_factor().itemsize for layer in layers)
        return whole / sum(layer.cost().bytes for layer in layers)
    whole = sum(layer.in_features * layer.out_features for layer in layers)
    return whole / sum(layer.cost().multiply_adds for layer in layers)


def _inside(model: nn.Module, layers: Sequence[str], run: Callable[[], object], fresh: Fresh) -> float:
    """The share of a pass that the layers take, the median of passes with hooks on them."""
    spent, begun = 0.0, 0.0

    def before(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def after(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter() - begun

    modules = [model.get_submodule(place) for place in layers]
    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules]
    shares = []
    try:
        for _ in range(WATCHED):
            with fresh():
                spent, start = 0.0, time.perf_counter()
                run()
                shares.append(spent / (time.perf_counter() - start))
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(shares)


def _tokens(model: nn.Module, count: int, length: int, seed: int) -> Tensor:
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _prefill(model: nn.Module, seed: int) -> tuple[Run, Fresh]:
    """A prompt of `PROMPT` tokens, the keys and values kept, as `generate` begins."""
    tokens = _tokens(model, 1, PROMPT, seed)
    return lambda form: form(input_ids=tokens, use_cache=True, logits_to_keep=1), _nothing


def _decode(model: nn.Module, seed: int) -> tuple[Run, Fresh]:
    """One token more, after a prompt of `PROMPT` tokens; each time from a copy of what the prompt left."""
    tokens = _tokens(model, 1, PROMPT + 1, seed)
    # transformers renamed it within version 5.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    filled = getattr(model(input_ids=tokens[:, :-1], use_cache=True, logits_to_keep=1), name)
    kept: dict[str, Any] = {}

    @contextmanager
    def fresh() -> Iterator[None]:
        kept["now"] = copy.deepcopy(filled)
        yield

    def run(form: nn.Module) -> object:
        return form(input_ids=tokens[:, -1:], **{name: kept["now"]}, use_cache=True, logits_to_keep=1)

    return run, fresh


def _encode(model: nn.Module, seed: int) -> tuple[Run, Fresh]:
    """A batch of `SENTENCES` of `LENGTH` tokens."""
    tokens = _tokens(model, SENTENCES, LENGTH, seed)
    mask = torch.ones_like(tokens)
    return lambda form: form(input_ids=tokens, attention_mask=mask), _nothing


TASKS: dict[str, dict[str, tuple[int, Callable[[nn.Module, int], tuple[Run, Fresh]]]]] = {
    "smollm2-135m": {"prefill": (PROMPT, _prefill), "decode": (1, _decode)},
    "minilm": {"encode": (SENTENCES * LENGTH, _encode)},
}


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']}, {row['dtype']}, {row['task']}, {row['threads']} threads, {row['form']}: "
        f"{row['ms']['value']:.4g} ms, {1 / row['ratio']['value']:.2f} x dense ({row['promise']:.2f} promised), "
        f"{100 * row['outside']:.0f} % outside the layers"
    )


def _markdown(result: Mapping[str, Any]) -> str:
    words = (
        f"{result['settings']['repeats']} interleaved repeats. Prefill: {PROMPT} tokens; decode: one token after them; "
        f"encode: {SENTENCES} sentences of {LENGTH} tokens. Keep {KEEP:g} of the matrices inside the blocks, factors "
        "random: time depends on shapes alone. Medians and quotients with 95 % bootstrap intervals, rounds drawn "
        "whole. Outside: the share of a pass that is not in the rewritten layers. Promised: the speedup if these took "
        "the time that their operations say, in decoding their bytes. Layers are in automatic mode, measured as by "
        "`isogrid tune` before; kept dense: what those planned dense keep in memory."
    )
    return table_page(result, table([_cells(row) for row in result["rows"]]), words)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    ms, ratio, dense = row["ms"], row["ratio"], row["form"] == "dense"
    return {
        "model": row["model"],
        "task": row["task"],
        "dtype": row["dtype"],
        "threads": row["threads"],
        "form": row["form"],
        "ms": f"{ms['value']:.4g} [{ms['lower']:.4g}, {ms['upper']:.4g}]",
        "x dense": None if dense else f"{1 / ratio['value']:.2f} [{1 / ratio['upper']:.2f}, {1 / ratio['lower']:.2f}]",
        "promised": None if dense else f"{row['promise']:.2f}",
        "outside": f"{100 * row['outside']:.0f} %",
        "planned dense": None if dense else f"{row['planned dense']} of {row['layers']}",
        "kept dense": None if dense else format_bytes(row["kept dense"]),
    }
