"""Does training in a subspace cost quality? A small GPT on Shakespeare's plays, every method on the same grid.

The question is how much of the gap between GaLore and AdamW a method closes: ``(GaLore - method) / (GaLore - AdamW)``
in validation loss. Where GaLore loses less than 0.02 nats, its rank is halved until the gap is there to be closed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isogrid.data import load_text
from isogrid.errors import IsogridError
from isogrid.models import GPT, GPTConfig, characters, random_windows, validation_loss
from isogrid.optim import make_optimizer, state_bytes
from isogrid.report import (
    format_duration,
    progress,
)
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table

STEPS, BATCH, LENGTH, REFRESH = 1500, 8, 64, 100
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = 3
SMALLEST_GAP = 0.02
# Plain forms: torch's conventions and no scale, so that one grid of learning rates fits all.
PLAIN = {"style": "torch", "eps": 1e-8, "scale": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "galore": {"method": "galore", "refresh": REFRESH, **PLAIN},
    "default": {"method": "default", "refresh": REFRESH},
    "default, power step": {"method": "default", "refresh": REFRESH, "power_steps": 1},
    "default, no residual": {"method": "default", "refresh": REFRESH, "residual": "none"},
    "fira": {"method": "fira", "refresh": REFRESH, **PLAIN},
    "ldadam": {"method": "ldadam"},
    "apollo": {"method": "apollo", "refresh": REFRESH, "style": "torch", "eps": 1e-8},
}


def train_gpt(
    method: str, rank: int, rate: float, seed: int, config: GPTConfig, ids: Tensor, validation: Tensor, steps: int
) -> dict[str, Any]:
    """Validation loss after a run with warm-up over a tenth and a linear decay to a tenth of the rate."""
    model = GPT(config, torch.Generator().manual_seed(seed))
    options = METHODS[method]
    if method == "adamw":
        optimizer: Any = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    else:
        optimizer = make_optimizer(model, lr=rate, rank=rank, **options)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 1 - 0.9 * (step - warm) / max(1, steps - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    draw = torch.Generator().manual_seed(1000 + seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(random_windows(ids, config.length, BATCH, draw)).backward()
        optimizer.step()
        schedule.step()
    return {"loss": validation_loss(model, validation), "state_bytes": sum(state_bytes(optimizer).values())}


def run_optimizer_quality(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    methods: Sequence[str] = (),
    ranks: Sequence[int] = (),
    command: str = "isogrid study optimizer_quality",
    say: Say = print,
) -> dict[str, Any]:
    """Every method at its best of four learning rates (chosen on the first seed), three seeds there.

    Args:
        out: folder for ``table.md`` and ``data.json``. Runs are kept in ``runs/study/optimizer_quality``.
        quick: two layers of width 32, 30 steps, two rates, one seed.
        seed: the first seed.
        data_dir: where the plays are looked up first.
        methods: keys of `METHODS`; AdamW and GaLore are always there.
        ranks: one rank, instead of a sixteenth of the width.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The table.

    Raises:
        IsogridError: an unknown method, or more than one rank.
    """
    if len(ranks) > 1:
        raise IsogridError(
            f"--rank is given {len(ranks)} times ({', '.join(map(str, ranks))}); optimizer_quality compares at one rank"
        )
    for name in methods:
        if name not in METHODS:
            raise IsogridError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    ids, alphabet = characters(load_text("shakespeare", data_dir))
    cut = int(0.9 * len(ids))
    config = GPTConfig(alphabet, 32, 32, 2, 2) if quick else GPTConfig(alphabet, LENGTH)
    steps, rates, seeds = (30, RATES[1:3], 1) if quick else (STEPS, RATES, SEEDS)
    chosen = list(dict.fromkeys(["adamw", "galore", *(methods or METHODS)]))
    count = len(chosen) * (len(rates) + seeds - 1)
    say(f"{count} runs of {steps} steps; about {format_duration(count * (1 if quick else 65))} on two cores")
    runs = Path("runs/study/optimizer_quality")
    with progress("Training", count) as step:

        def run(method: str, rank: int, rate: float, run_seed: int) -> dict[str, Any]:
            settings = {**asdict(config), "steps": steps, "batch": BATCH, "options": METHODS[method]}
            work: Callable[[], dict[str, Any]] = partial(
                train_gpt, method, rank, rate, run_seed, config, ids[:cut], ids[cut:], steps
            )
            key = f"{method.replace(', ', '-').replace(' ', '-')}-{rank}-{rate:g}-{run_seed}"
            row = remembered(runs, key, settings, work)
            step(key)
            return row

        def best(method: str, rank: int) -> dict[str, Any]:
            grid = {rate: run(method, rank, rate, seed) for rate in rates}
            rate = min(grid, key=lambda one: grid[one]["loss"])
            found = [grid[rate], *(run(method, rank, rate, seed + number) for number in range(1, seeds))]
            losses = [row["loss"] for row in found]
            say(f"{method}, rank {rank}: {statistics.fmean(losses):.4f} at {rate:g}")
            return {
                "method": method,
                "rank": rank,
                "rate": rate,
                "loss": statistics.fmean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else None,
                "losses": losses,
                "grid": {f"{one:g}": row["loss"] for one, row in grid.items()},
                "state_bytes": found[0]["state_bytes"],
            }

        rank = ranks[0] if ranks else max(1, config.width // 16)
        adamw, galore = best("adamw", 0), best("galore", rank)
        while galore["loss"] - adamw["loss"] < SMALLEST_GAP and rank > 1 and not ranks:
            rank //= 2
            galore = best("galore", rank)
        rows = [adamw, galore, *(best(method, rank) for method in chosen[2:])]
    gap = galore["loss"] - adamw["loss"]
    for row in rows:
        row["closed"] = (galore["loss"] - row["loss"]) / gap if gap > 0 else None
    result = {
        **heading(f"GPT of {config.layers} layers, width {config.width}, {steps} steps, rank {rank}", command),
        "rows": rows,
        "gap": gap,
    }
    return write_table(result, _markdown(result), out)


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| Method | Best rate | Validation loss | Of the gap closed | Optimizer state MiB |",
        "| - | -: | -: | -: | -: |",
    ]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
        closed = "–" if row["closed"] is None else f"{100 * row['closed']:.0f} %"
        lines.append(
            f"| {row['method']} | {row['rate']:g} | {row['loss']:.4f}{spread} | {closed} "
            f"| {row['state_bytes'] / 2**20:.2f} |"
        )
    return table_page(
        result,
        lines,
        "Validation loss in nats a character, mean over seeds; GaLore's gap to AdamW is "
        f"{result['gap']:.4f}. Rates are chosen on the first seed. Embeddings and vectors are trained by AdamW "
        "everywhere.",
    )
