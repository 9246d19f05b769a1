"""Budgets in milliseconds, checked: the time that a pass is said to take beside the time it takes.

Fits are plain and fast here: time depends on shapes alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isogrid.compress import Milliseconds, compress, select_layers
from isogrid.compress.milliseconds import TimedPrices
from isogrid.data import load_pretrained
from isogrid.errors import BudgetError
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table

MODELS = {"smollm2-135m": 512, "minilm": 256}
FORMATS = ("low_rank", "low_rank_light")
# Of the layers' own time.
SHARES = (0.8, 0.6)
TRIALS = 3


def run_time_budget(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study time_budget",
    say: Say = print,
) -> dict[str, Any]:
    """Two models, two formats, two budgets: predicted and measured milliseconds of a pass.

    Args:
        out: folder for ``table.md`` and ``data.json``. Rows are kept in ``runs/study/time_budget``.
        quick: few repeats, the smaller model.
        seed: of fits.
        data_dir: not needed: the models are packaged, their inputs random tokens.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.

    Raises:
        BudgetError: the machine's pace changes so much that no budget holds; the rows before are kept.
    """
    names = list(MODELS)[1:] if quick else list(MODELS)
    repeats = 5 if quick else 31
    say(f"{len(names) * len(FORMATS) * len(SHARES)} rows; about {1 if quick else 15} minutes on two cores")
    settings = {"repeats": repeats, "threads": torch.get_num_threads(), "seed": seed}
    rows = []
    for name in names:
        model: Any = None
        for fmt in FORMATS:
            for share in SHARES:

                def make(fmt: str = fmt, share: float = share, name: str = name) -> dict[str, Any]:
                    nonlocal model
                    model = model or load_pretrained(name)[0]
                    return _row(name, model, fmt, share, repeats, seed)

                key = f"{name}-{fmt}-{share:g}"
                rows.append(remembered(Path("runs/study/time_budget"), key, settings, partial(_again, make, say)))
                say(_line(rows[-1]))
    result = {**heading("Budgets in milliseconds: predicted and measured", command, settings), "rows": rows}
    return write_table(result, _markdown(result), out)


def _again(make: Callable[[], dict[str, Any]], say: Say) -> dict[str, Any]:
    """A row, at the third trial at the latest: a busy machine's pace may change between a budget and its spending."""
    for _ in range(TRIALS - 1):
        try:
            return make()
        except BudgetError as error:
            say(f"once more, with a new budget: {error}")
    return make()


def _row(name: str, model: Any, fmt: str, share: float, repeats: int, seed: int) -> dict[str, Any]:
    tokens = torch.randint(model.config.vocab_size, (1, MODELS[name]), generator=torch.Generator().manual_seed(seed))
    smaller = copy.deepcopy(model)
    layers = select_layers(smaller)
    own = TimedPrices(smaller, layers, Milliseconds(1.0, tokens, repeats), None)
    limit = (own.outside + share * own.whole()) / 1e6
    report = compress(smaller, fmt, budget=Milliseconds(limit, tokens, repeats), allocate="water_filling", seed=seed)
    assert report.milliseconds is not None
    assert report.predicted_milliseconds is not None
    now, dense = report.milliseconds["structured"], report.milliseconds["dense"]
    return {
        "model": name,
        "tokens": MODELS[name],
        "format": fmt,
        "share": share,
        "keep": report.achieved_keep,
        "limit": limit,
        "predicted": report.predicted_milliseconds,
        "measured": now.median,
        "quartiles": [now.lower, now.upper],
        "dense": dense.median,
        "outside": own.outside / 1e6,
        "ratio": report.predicted_milliseconds / now.median,
        "predicted_speedup": report.predicted_speedup,
        "speedup": dense.median / now.median,
        "speedup_ratio": (report.predicted_speedup or math.nan) / (dense.median / now.median),
    }


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']}, {row['format']}, {row['share']:g} of the layers' time: {row['dense']:.4g} ms dense, limit "
        f"{row['limit']:.4g}, predicted {row['predicted']:.4g}, measured {row['measured']:.4g} ({row['ratio']:.3f}); "
        f"speedup {row['predicted_speedup']:.3f}, "
        f"{row['speedup']:.3f} ({row['speedup_ratio']:.3f})"
    )


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [
        "| model | tokens | format | keep | dense ms | outside the layers | limit | predicted | measured | quartiles | "
        "predicted / measured | speedup predicted | measured | predicted / measured |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lower, upper = row["quartiles"]
        lines.append(
            f"| {row['model']} | {row['tokens']} | {row['format']} | {row['keep']:.3f} | {row['dense']:.4g} | "
            f"{row['outside']:.4g} | {row['limit']:.4g} | {row['predicted']:.4g} | {row['measured']:.4g} | "
            f"{lower:.4g} to {upper:.4g} | {row['ratio']:.3f} | "
            f"{row['predicted_speedup']:.3f} | {row['speedup']:.3f} | {row['speedup_ratio']:.3f} |"
        )
    settings = result["settings"]
    words = (
        f"A pass of one window, {settings['repeats']} passes of the compressed and the dense model in turns, medians; "
        f"threads: {settings['threads']}. Milliseconds are predicted before and measured after: on a machine that "
        "others use, its pace changes between; a speedup is a quotient of the same minute. Plain fits: time depends on "
        "shapes alone."
    )
    return table_page(result, lines, words)
