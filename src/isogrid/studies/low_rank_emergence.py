"""How low ranks emerge while a small GPT trains: in gradients (GaLore's thesis) and in weights (WeLore's).

Zhao et al. 2024 prove that gradients of reversible networks lose rank as training goes on; Jaiswal et al. 2024 (WeLore)
claim that matrices whose gradient subspace keeps carrying signal end with compressible spectra. Here every matrix of a
GPT is watched: stable rank of its gradient, overlap of the leading gradient subspaces of successive looks, and at the
end the spectrum of its weight with the rank that WeLore's global threshold keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isogrid.data import load_text
from isogrid.evaluation import spearman
from isogrid.fitting import leading_left
from isogrid.models import GPT, GPTConfig, characters, random_windows, validation_loss
from isogrid.report import (
    format_duration,
    measure_lines,
    progress,
    save_figure,
    write_csv,
)
from isogrid.studies.rows import Say, heading, remembered, table_page, write_table

STEPS, LOOK_EVERY, BATCH = 1500, 50, 8
LEADING = 8
# Share of all ranks that the global threshold takes away; a matrix that loses more than half is low rank.
REDUCTION, LOW_RANK_SHARE = 0.5, 0.5


def stable_rank(matrix: Tensor) -> float:
    """``‖G‖_F² / ‖G‖_2²``, 0 for a matrix of zeros."""
    sigma = torch.linalg.svdvals(matrix.double())
    return float(sigma.square().sum() / sigma[0].square()) if float(sigma[0]) > 0 else 0.0


def overlap(one: Tensor, other: Tensor) -> float:
    """``‖PᵀQ‖_F² / r`` of two orthonormal bases ``(d, r)``: 1 for the same subspace, about r/d for random ones."""
    return float((one.mT @ other).square().sum() / one.shape[1])


def welore_ranks(spectra: Mapping[str, Tensor], reduction: float) -> dict[str, int]:
    """Ranks that one threshold on min-max-normalised singular values keeps (Jaiswal et al. 2024, section 2 of v1).

    The threshold is the smallest that takes away at least the share ``reduction`` of all ranks together, found among
    the pooled values; every matrix keeps one direction.

    Args:
        spectra: singular values of each matrix, descending.
        reduction: in [0, 1).
    """
    normalised = {}
    for name, sigma in spectra.items():
        span = sigma[0] - sigma[-1]
        normalised[name] = (sigma - sigma[-1]) / span if float(span) > 0 else torch.ones_like(sigma)
    pooled = torch.cat(list(normalised.values())).sort().values
    needed = math.ceil(reduction * len(pooled) - 1e-9)
    if needed == 0:
        threshold = 0.0
    else:
        above = pooled[pooled > pooled[needed - 1]]
        threshold = float(above[0]) if len(above) else 1.0
    return {name: max(1, int((values >= threshold).sum())) for name, values in normalised.items()}


def linear_toy(directions: int, steps: int = 3000, seed: int = 0) -> tuple[int, float, float]:
    """(rank of the first gradient, stable rank of the first and of the last) of GaLore's linear example.

    ``G = (A - f Wᵀ B)ᵀ f / 64``, ``W`` (32, 32) from zero, 64 inputs ``f`` that span ``directions`` dimensions,
    Gaussian targets A, ``B = Q Qᵀ / 32 + 0.1 I``; steps of half the stable size.
    """
    draw = torch.Generator().manual_seed(seed)

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw, dtype=torch.float64)

    inputs = gaussian(64, directions) @ gaussian(directions, 32)
    targets, q = gaussian(64, 32), gaussian(32, 32)
    b = q @ q.mT / 32 + 0.1 * torch.eye(32, dtype=torch.float64)
    c = inputs.mT @ inputs / 64
    eta = 0.5 / float(torch.linalg.eigvalsh(c)[-1] * torch.linalg.eigvalsh(b)[-1])
    weight = torch.zeros(32, 32, dtype=torch.float64)
    first = gradient = (targets - inputs @ weight.mT @ b).mT @ inputs / 64
    for _ in range(steps):
        gradient = (targets - inputs @ weight.mT @ b).mT @ inputs / 64
        weight += eta * gradient
    return int(torch.linalg.matrix_rank(first)), stable_rank(first), stable_rank(gradient)


def watch(
    config: GPTConfig, ids: Tensor, validation: Tensor, steps: int, every: int, seed: int, tick: Any
) -> dict[str, Any]:
    """Train with AdamW and look at every block matrix's gradient each ``every`` steps."""
    model = GPT(config, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed + 1)
    matrices = {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.blocks.named_parameters()
        if parameter.ndim == 2
    }
    bases: dict[str, Tensor] = {}
    looks: list[dict[str, Any]] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.loss(random_windows(ids, config.length, BATCH, draw))
        loss.backward()
        if step % every == 0 or step == steps - 1:
            for name, parameter in matrices.items():
                assert parameter.grad is not None
                gradient = parameter.grad.double()
                gradient = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.mT
                basis = leading_left(gradient, min(LEADING, gradient.shape[0]))
                looks.append(
                    {
                        "step": step,
                        "matrix": name,
                        "stable_rank": stable_rank(gradient),
                        "overlap": overlap(basis, bases[name]) if name in bases else None,
                    }
                )
                bases[name] = basis
        optimizer.step()
        schedule.step()
        tick(f"step {step}")
    spectra = {name: torch.linalg.svdvals(parameter.detach().double()).tolist() for name, parameter in matrices.items()}
    return {"looks": looks, "spectra": spectra, "validation_loss": validation_loss(model, validation)}


def run_low_rank_emergence(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study low_rank_emergence",
    say: Say = print,
) -> dict[str, Any]:
    """Watch gradients and weights of a small GPT on Shakespeare's plays, and correlate them with WeLore's ranks.

    Args:
        out: folder for ``table.md``, ``looks.csv``, ``data.json`` and three pictures. The run is kept in
            ``runs/study/low_rank_emergence``.
        quick: two layers of width 32, 40 steps.
        seed: of start and batches.
        data_dir: where the plays are looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The table: a row a matrix, correlations, and the linear example.
    """
    ids, alphabet = characters(load_text("shakespeare", data_dir))
    cut = int(0.9 * len(ids))
    config = GPTConfig(alphabet, 32, 32, 2, 2) if quick else GPTConfig(alphabet)
    steps, every = (40, 5) if quick else (STEPS, LOOK_EVERY)
    seconds = 3 if quick else 0.16 * steps
    say(f"{steps} steps of a GPT of {config.layers} layers, width {config.width}: about {format_duration(seconds)}")
    with progress("Training", steps) as tick:
        work = partial(watch, config, ids[:cut], ids[cut:], steps, every, seed, tick)
        settings = {"config": str(config), "steps": steps, "every": every, "seed": seed}
        found = remembered(Path("runs/study/low_rank_emergence"), "gpt", settings, work)
    rows = table_of(found, steps)
    late = [row["late_stable_rank"] for row in rows]
    kept = [row["welore_kept"] for row in rows]
    overlaps = [row["late_overlap"] for row in rows]
    result = {
        **heading(
            f"Low rank in gradients and weights of a GPT ({config.layers} layers, width {config.width})",
            command,
            settings,
        ),
        "validation_loss": found["validation_loss"],
        "rows": rows,
        "correlations": {
            "late gradient stable rank with WeLore's kept share": _correlation(late, kept),
            "late overlap of gradient subspaces with WeLore's kept share": _correlation(overlaps, kept),
            "late gradient stable rank with the weight's stable rank": _correlation(
                late, [row["weight_stable_rank"] for row in rows]
            ),
        },
        "linear_toy": {str(n): linear_toy(n, 100 if quick else 3000) for n in (4, 8, 16)},
    }
    write_csv(found["looks"], out / "looks.csv")
    _draw(found, out)
    return write_table(result, _markdown(result), out)


def table_of(found: Mapping[str, Any], steps: int) -> list[dict[str, Any]]:
    """A row a matrix: means over the first and the last quarter of the looks, the weight's spectrum, WeLore's rank."""
    spectra = {name: torch.tensor(values, dtype=torch.float64) for name, values in found["spectra"].items()}
    ranks = welore_ranks(spectra, REDUCTION)
    rows = []
    for name, sigma in spectra.items():
        mine = [look for look in found["looks"] if look["matrix"] == name]
        early = [look for look in mine if look["step"] <= steps / 4]
        late = [look for look in mine if look["step"] >= 3 * steps / 4]
        kept = ranks[name] / len(sigma)
        rows.append(
            {
                "matrix": name,
                "early_stable_rank": _mean(early, "stable_rank"),
                "late_stable_rank": _mean(late, "stable_rank"),
                "early_overlap": _mean(early, "overlap"),
                "late_overlap": _mean(late, "overlap"),
                "weight_stable_rank": float(sigma.square().sum() / sigma[0].square()),
                "welore_rank": ranks[name],
                "welore_kept": kept,
                "low_rank_component": 1 - kept > LOW_RANK_SHARE,
            }
        )
    return rows


def _mean(looks: list[dict[str, Any]], key: str) -> float:
    values = [look[key] for look in looks if look[key] is not None]
    return sum(values) / len(values) if values else math.nan


def _correlation(one: list[float], other: list[float]) -> float:
    return float(spearman(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)))


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| Matrix | Gradient's stable rank, early | late | Overlap of subspaces, early | late | Weight's stable rank "
        "| WeLore's rank | kept | Low rank |",
        "| - | -: | -: | -: | -: | -: | -: | -: | - |",
    ]
    lines += [
        f"| {row['matrix']} | {row['early_stable_rank']:.2f} | {row['late_stable_rank']:.2f} "
        f"| {row['early_overlap']:.3f} | {row['late_overlap']:.3f} | {row['weight_stable_rank']:.2f} "
        f"| {row['welore_rank']} | {100 * row['welore_kept']:.0f} % | {'yes' if row['low_rank_component'] else 'no'} |"
        for row in result["rows"]
    ]
    lines += ["", "| Spearman correlation over matrices | |", "| - | -: |"]
    lines += [f"| {name} | {value:+.3f} |" for name, value in result["correlations"].items()]
    lines += ["", "| Linear example, dimensions of the inputs | rank of the gradient | stable rank, first | last |"]
    lines += ["| -: | -: | -: | -: |"]
    lines += [f"| {n} | {rank} | {a:.2f} | {b:.2f} |" for n, (rank, a, b) in result["linear_toy"].items()]
    return table_page(
        result,
        lines,
        f"Overlap: share of the {LEADING} leading gradient directions that the last look had too. WeLore's rank: "
        f"one threshold over all matrices that takes {100 * REDUCTION:.0f} % of all ranks away. Validation loss "
        f"{result['validation_loss']:.4f} nats.",
    )


def _draw(found: Mapping[str, Any], out: Path) -> None:
    kinds = sorted({look["matrix"].split(".", 1)[1] for look in found["looks"]})
    for key, label in (("stable_rank", "stable rank of the gradient"), ("overlap", "overlap with the last look")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for kind in kinds:
            points: dict[int, list[float]] = {}
            for look in found["looks"]:
                if look["matrix"].split(".", 1)[1] == kind and look[key] is not None:
                    points.setdefault(look["step"], []).append(look[key])
            lines[kind] = [(step, sum(values) / len(values)) for step, values in points.items()]
        save_figure(measure_lines(lines, x="step", y=f"{label}, mean over layers"), out / f"{key}.png")
    spectra: dict[str, list[tuple[float, float]]] = {}
    for kind in kinds:
        mine = [values for name, values in found["spectra"].items() if name.split(".", 1)[1] == kind]
        means = [sum(column) / len(column) for column in zip(*mine, strict=True)]
        spectra[kind] = [((index + 1) / len(means), value / means[0]) for index, value in enumerate(means)]
    save_figure(
        measure_lines(spectra, x="index over the short side", y="singular value over the first"), out / "spectra.png"
    )
