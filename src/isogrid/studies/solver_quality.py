"""How good the solvers are: small problems on which many restarts of a descent come near the global minimum."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isogrid.fitting import Metric, squared_norm
from isogrid.formats import (
    Blast,
    BlockDense,
    BlockTensorChain,
    BlockTensorTrain,
    Format,
    Kronecker,
    LowRank,
    Monarch,
    TensorTrain,
)
from isogrid.report import format_duration, progress
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table

OUT, IN = 12, 16
# Each restart gets 40 steps of quasi-Newton descent, the best of them 200 more.
RESTARTS, POLISHED = 20, 5
WITHIN = 1.01
MEMBERS: tuple[Format, ...] = (
    LowRank(4),
    Monarch(4, rank=1),
    BlockTensorTrain(1),
    Blast(3, 4),
    Kronecker(2),
    TensorTrain(2, cores=3),
    BlockTensorChain(1, cores=3),
    BlockDense(1, 4),
)


def problem(seed: int) -> tuple[torch.Tensor, Metric]:
    """A Gaussian target ``(12, 16)`` and a metric with random axes and variances i⁻²."""
    source = torch.Generator().manual_seed(seed)
    target = torch.randn(OUT, IN, generator=source, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(IN, IN, generator=source, dtype=torch.float64)).Q
    return target, Metric((axes * torch.arange(1, IN + 1, dtype=torch.float64) ** -2) @ axes.mT)


def measure(fmt: Format, seed: int) -> dict[str, Any]:
    """Objectives of the format's own fit, of the general solver, and of the best of 20 descents from random starts."""
    target, metric = problem(seed)
    told: list[tuple[int, float]] = []
    begun = time.perf_counter()
    _, own = fmt.fit_and_report(target, metric)
    _, general = fmt.fit_and_report(target, metric, solver="general", on_step=lambda *step: told.append(step))
    seconds = time.perf_counter() - begun
    starts: list[dict[str, torch.Tensor] | None] = [None] * RESTARTS
    reached: list[tuple[float, dict[str, torch.Tensor]]] = []
    for steps, kept in ((40, RESTARTS), (200, POLISHED)):
        begun_from = starts if not reached else [factors for _, factors in reached[:kept]]
        reached = []
        for restart, start in enumerate(begun_from):
            source = torch.Generator().manual_seed(1000 * seed + restart)
            factors = Format.solve(
                fmt, target, metric, solver="descent", start=start, generator=source, on_step=None, steps=steps
            )
            reached.append((squared_norm(target - fmt.dense(factors, OUT, IN), metric), factors))
        reached.sort(key=lambda one: one[0])
    bound = fmt.lower_bound(target, metric)
    return {
        "own": own.objective,
        "general": general.objective,
        "best": reached[0][0],
        "fifth": reached[-1][0],
        "bound": bound,
        # Step 0 begins the next start.
        "rises": sum(after > before * (1 + 1e-12) for (_, before), (step, after) in itertools.pairwise(told) if step),
        "seconds": seconds,
    }


def run_solver_quality(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study solver_quality",
    say: Say = print,
) -> dict[str, Any]:
    """Fifty small problems under a metric for each multilinear format: own fit and general solver beside restarts.

    Args:
        out: folder for ``table.md`` and ``data.json``. Problems are kept in ``runs/study/solver_quality`` and not
            solved again.
        quick: three problems a format.
        seed: added to the problems' seeds.
        data_dir: not used; problems are drawn.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The table: for each format the ratios to the best of 20 restarts.
    """
    problems = 3 if quick else 50
    say(f"{len(MEMBERS)} formats, {problems} problems each; about {'2' if quick else '30'} minutes on two cores")
    runs = Path("runs/study/solver_quality")
    settings = {"out": OUT, "in": IN, "restarts": RESTARTS}
    rows: list[dict[str, Any]] = []
    with progress("Solving", len(MEMBERS) * problems) as step:
        for fmt in MEMBERS:
            found = []
            for number in range(seed, seed + problems):
                key = f"{fmt.name}-{number}"
                found.append(remembered(runs, key, settings | {"format": fmt.label()}, partial(measure, fmt, number)))
                step(key)
            general = sorted(one["general"] / one["best"] for one in found)
            own = sorted(one["own"] / one["best"] for one in found)
            rows.append(
                {
                    "format": fmt.label(),
                    "problems": problems,
                    "own_median": own[problems // 2],
                    "own_worst": own[-1],
                    "general_median": general[problems // 2],
                    "general_worst": general[-1],
                    "within": sum(ratio <= WITHIN for ratio in general),
                    "better": sum(ratio < 1 - 1e-6 for ratio in general),
                    "fifth": sorted(one["fifth"] / one["best"] for one in found)[problems // 2],
                    "rises": sum(one["rises"] for one in found),
                    "seconds": sum(one["seconds"] for one in found) / problems,
                }
            )
            row = rows[-1]
            say(f"{row['format']}: {row['within']} of {problems} within 1 %, worst {row['general_worst']:.4f}")
    result = {
        **heading(f"Solvers on {problems} small problems a format, {OUT} x {IN}, metric with variances 1/i²", command),
        "rows": rows,
    }
    return write_table(result, _markdown(result), out)


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| Format | General within 1 % | better | median | worst | Own median | worst | Fifth restart | Rises | Time |",
        "| - | -: | -: | -: | -: | -: | -: | -: | -: | -: |",
    ]
    lines += [
        f"| `{row['format']}` | {row['within']} of {row['problems']} | {row['better']} | {row['general_median']:.4f} "
        f"| {row['general_worst']:.4f} | {row['own_median']:.4f} | {row['own_worst']:.4f} | {row['fifth']:.4f} "
        f"| {row['rises']} | {format_duration(row['seconds'])} |"
        for row in result["rows"]
    ]
    return table_page(
        result,
        lines,
        f"Objectives divided by the best of {RESTARTS} quasi-Newton descents, five of them polished. General: "
        '`fit(..., solver="general")`, which goes on from the own fit and, with Levenberg-Marquardt steps, from '
        "many starts; better: problems on which it ends below all restarts; rises: steps after which the objective "
        "was larger; time: of own and general fit of one problem. Own: the format's default, made for speed at the "
        "size of layers. Fifth restart: the worst of the five that were polished.",
    )
