"""Fine-tuning in little memory: the source's table of methods and ranks, on a sentence encoder that is at hand.

Bal, Hariharane, Gobinathan 2025. The source's own table compares different numbers of updates (section 8 of its notes:
rSVDAdam ran at an effective batch of 128, the others at 32), prints evaluation losses one epoch late, and reads further
overfitting as a gain. Here every method makes the same updates on the same batches, and both losses are shown.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isogrid.data import LabelledTexts, load_imdb, load_pretrained, load_sst2
from isogrid.errors import IsogridError
from isogrid.report import (
    format_duration,
    measure_lines,
    progress,
    save_figure,
    stacked_bars,
)
from isogrid.studies.finetuning_methods import METHODS, share_of
from isogrid.studies.finetuning_run import Plan, train_run, write_files
from isogrid.studies.rows import Say, fingerprint, heading, remembered, table_page, write_table

MODEL = "minilm"
# 4,000 examples, 2 epochs, would take 43 runs of 10 TFLOP, more than two hours on two cores.
EXAMPLES, RANKS, SEEDED_RANK, SEEDS = 1000, (4, 16, 64), 16, 3
FULL_RANKS = (4, 8, 16, 64, 128)
# For the estimate: operations a second that small matrix products reach on two cores, and a forward pass per token.
SPEED = 45e9
TOKENS_OF_EXAMPLE = 16
OPERATIONS_OF_TOKEN = 21.3e6


def planned_runs(
    methods: Sequence[str], ranks: Sequence[int], seed: int, seeds: int, seeded_rank: int
) -> list[tuple[str, int, int]]:
    """(method, rank, seed) of every run: several seeds at one rank, one at the others."""
    runs = []
    for method in methods:
        for rank in ranks if METHODS[method].ranked else (seeded_rank,):
            count = seeds if rank == seeded_rank or len(ranks) == 1 else 1
            runs += [(method, rank, seed + number) for number in range(count)]
    return runs


def run_sst2_finetuning(
    out: Path,
    *,
    quick: bool = False,
    full: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    methods: Sequence[str] = (),
    ranks: Sequence[int] = (),
    imdb: Path | None = None,
    command: str = "isogrid study sst2_finetuning",
    say: Say = print,
) -> dict[str, Any]:
    """Nine ways to fine-tune, at several ranks, on SST-2 or IMDB.

    Args:
        out: folder for ``table.md``, ``data.json``, the pictures, and a folder a run with its four csv files. Finished
            runs are kept in ``runs/study/sst2_finetuning``; a killed one goes on at its last checkpoint.
        quick: 96 examples, one epoch, rank 4, one seed.
        full: the source's setting: all examples, ten epochs, length 128, ranks 4 to 128, bases every 500 steps.
        seed: the first seed.
        data_dir: where SST-2 is looked up first.
        methods: keys of `METHODS`; all by default.
        ranks: ranks; 4, 16 and 64 by default.
        imdb: a folder with IMDB, to use instead.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The table.

    Raises:
        IsogridError: an unknown method, a rank below 1, or one that a method can't have.
    """
    for name in methods:
        if name not in METHODS:
            raise IsogridError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    if any(rank < 1 for rank in ranks):
        raise IsogridError(f"ranks are {list(ranks)}; each is at least 1")
    chosen = list(methods) or list(METHODS)
    plan, examples, seeds = Plan(), EXAMPLES, SEEDS
    picked = list(ranks) or list(RANKS)
    if full:
        plan = Plan(epochs=10, length=128, refresh=500, checkpoint_every=500)
        examples, picked = 10**9, list(ranks) or list(FULL_RANKS)
    if quick:
        plan, examples, seeds = replace(plan, epochs=1, length=32, refresh=2, checkpoint_every=0), 96, 1
        picked = list(ranks) or [4]
    if "svt_fraction" in chosen:
        for rank in picked:
            share_of(rank)
    source = "SST-2" if imdb is None else "IMDB"
    train, test = _data(imdb, data_dir, examples, 64 if quick else None, seed)
    seeded_rank = SEEDED_RANK if SEEDED_RANK in picked else picked[0]
    planned = planned_runs(chosen, picked, seed, seeds, seeded_rank)
    # A training pass is three forward passes, an evaluation one.
    cost = OPERATIONS_OF_TOKEN * TOKENS_OF_EXAMPLE * (3 * len(train) + len(test)) * plan.epochs
    say(
        f"{len(planned)} runs of {len(train)} examples, {plan.epochs} epochs: {cost / 1e12:.1f} TFLOP each; about "
        f"{format_duration(len(planned) * cost / SPEED)} on two cores"
    )
    encoder, tokenizer = load_pretrained(MODEL)
    runs = Path("runs/study/sst2_finetuning")
    settings = {**asdict(plan), "examples": len(train), "data": source, "seed": seed, "tests": len(test)}
    settings["texts"] = fingerprint(
        [train.texts, train.labels, test.texts, test.labels]
    )  # a folder may hold others now
    rows = []
    with progress("Training", len(planned)) as step:
        for method, rank, run_seed in planned:
            key = f"{method}-{rank}-{run_seed}"
            folder = out / method / f"rank-{rank}" / f"seed-{run_seed}"
            make = partial(copy.deepcopy, encoder)
            work = partial(train_run, method, rank, run_seed, make, tokenizer, train, test, plan, folder, settings)
            row = remembered(runs, key, settings, work)
            write_files(row, folder)  # a remembered one may find an empty folder, or another run's files
            rows.append(row)
            step(key)
            say(f"{key}: train {row['train_loss']:.4f}, eval {row['eval_loss']:.4f}, accuracy {row['accuracy']:.4f}")
    result = {
        **heading(
            f"Fine-tuning {MODEL} on {source}: {len(train)} examples, {plan.epochs} epochs, batch {plan.batch}",
            command,
            {**asdict(plan), "examples": len(train), "evaluation": len(test), "data": source},
        ),
        "rows": rows,
        "summary": summary(rows),
        "claims": claims(rows),
    }
    _draw(result, out)
    return write_table(result, _markdown(result), out)


def _data(
    imdb: Path | None, data_dir: Path | None, examples: int, tests: int | None, seed: int
) -> tuple[LabelledTexts, LabelledTexts]:
    draw = torch.Generator().manual_seed(seed)
    if imdb is None:
        train, test = load_sst2("train", data_dir), load_sst2("test", data_dir)
    else:
        train, test = load_imdb(imdb, "train"), load_imdb(imdb, "test")
    return train.sample(examples, draw), test if tests is None else test.sample(tests, draw)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (standard deviation) over seeds, a row for each method and rank."""
    table = []
    for method, rank in dict.fromkeys((row["method"], row["rank"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["rank"]) == (method, rank)]
        entry: dict[str, Any] = {"method": method, "label": mine[0]["label"], "rank": rank, "seeds": len(mine)}
        for key in ("train_loss", "eval_loss", "best_eval_loss", "accuracy"):
            values = [row[key] for row in mine]
            entry[key] = statistics.fmean(values)
            entry[f"{key}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        for key in ("trainable", "state_bytes", "accounted_bytes"):
            entry[key] = mine[0][key]
        entry["memory"] = mine[0]["memory"]
        table.append(entry)
    return table


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The source's claims, each held or not by these runs; None where the runs don't say."""
    table = {(row["method"], row["rank"]): row for row in summary(rows)}
    ranks = sorted({rank for method, rank in table if METHODS[method].ranked})
    shared = [rank for rank in ranks if {("rsvd_adam", rank), ("lora", rank)} <= table.keys()]

    def always(compare: Any) -> bool | None:
        return all(compare(rank) for rank in shared) if shared else None

    adam = next((row for (method, _), row in table.items() if method == "adam"), None)
    rsvd = [table["rsvd_adam", rank] for rank in ranks if ("rsvd_adam", rank) in table]
    both = [rank for rank in ranks if {("factored", rank), ("lora", rank)} <= table.keys()]
    return [
        {
            "claim": "rSVDAdam reaches a lower training loss than LoRA at every rank",
            "held": always(lambda r: table["rsvd_adam", r]["train_loss"] < table["lora", r]["train_loss"]),
        },
        {
            "claim": "rSVDAdam reaches a lower best evaluation loss than LoRA at every rank",
            "held": always(lambda r: table["rsvd_adam", r]["best_eval_loss"] < table["lora", r]["best_eval_loss"]),
        },
        {
            "claim": "rSVDAdam trains in less memory than LoRA",
            "held": always(lambda r: table["rsvd_adam", r]["accounted_bytes"] < table["lora", r]["accounted_bytes"]),
        },
        {
            "claim": "rSVDAdam's optimizer state is below 20 % of Adam's at every rank",
            "held": all(row["state_bytes"] < 0.2 * adam["state_bytes"] for row in rsvd) if adam and rsvd else None,
        },
        {
            "claim": "training loss falls as rSVDAdam's rank grows",
            "held": all(b["train_loss"] < a["train_loss"] for a, b in itertools.pairwise(rsvd))
            if len(rsvd) > 1
            else None,
        },
        {
            "claim": "trained factors take less memory than LoRA",
            "held": all(table["factored", r]["accounted_bytes"] < table["lora", r]["accounted_bytes"] for r in both)
            if both
            else None,
        },
    ]


def _spread(row: dict[str, Any], key: str) -> str:
    spread = row[f"{key}_spread"]
    return f"{row[key]:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| Method | Rank | Seeds | Train loss | Eval loss | Best eval loss | Accuracy | Trained numbers | State MiB "
        "| All MiB |",
        "| - | -: | -: | -: | -: | -: | -: | -: | -: | -: |",
    ]
    lines += [
        f"| {row['label']} | {row['rank'] if METHODS[row['method']].ranked else '–'} | {row['seeds']} "
        f"| {_spread(row, 'train_loss')} | {_spread(row, 'eval_loss')} | {_spread(row, 'best_eval_loss')} "
        f"| {_spread(row, 'accuracy')} | {row['trainable']:,} | {row['state_bytes'] / 2**20:.2f} "
        f"| {row['accounted_bytes'] / 2**20:.1f} |"
        for row in result["summary"]
    ]
    words = {True: "held", False: "not held", None: "not tested"}
    lines += ["", "| Claim of the source | Here |", "| - | - |"]
    lines += [f"| {entry['claim']} | {words[entry['held']]} |" for entry in result["claims"]]
    return table_page(
        result,
        lines,
        "± is the standard deviation over seeds. All methods make the same updates on the same batches with the "
        "same learning rate and decay; the source gave rSVDAdam four times fewer updates at four times the batch. "
        "All MiB: parameters, gradients, optimizer state, and the outputs of all leaf modules at one batch.",
    )


def _draw(result: dict[str, Any], out: Path) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["summary"]:
        if METHODS[row["method"]].ranked:
            lines.setdefault(row["label"], []).append((row["rank"], row["eval_loss"]))
    if lines:
        figure = measure_lines(lines, x="rank", y="evaluation loss", title=result["title"], log_x=True)
        save_figure(figure, out / "loss_over_ranks.png")
    parts, states = {}, {}
    for row in result["summary"]:
        name = f"{row['label']}, {row['rank']}" if METHODS[row["method"]].ranked else row["label"]
        whole = {"optimizer state": float(row["state_bytes"])}
        whole |= {part: float(row["memory"][part]) for part in ("parameters", "gradients", "activations")}
        parts[name] = whole
        states[name] = {part[7:]: count for part, count in row["memory"].items() if part.startswith("state: ")}
    save_figure(stacked_bars(parts, title="Memory of a training step"), out / "memory_breakdown.png")
    save_figure(stacked_bars(states, title="Optimizer state by key"), out / "optimizer_memory.png")
