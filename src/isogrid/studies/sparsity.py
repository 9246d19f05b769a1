"""Sparse matrices on a language model: every pruner at 2:4, and other formats at the bytes that ARMOR takes.

All rows know the same second moments of the original model's inputs. Sizes are counted at 16-bit numbers, masks, codes
and scales included.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.compress import (
    Moments,
    Plan,
    collect_moments,
    compress,
    count_parameters,
    dense_parameters,
    select_layers,
    stored_bytes,
)
from isogrid.data import load_pretrained, load_text, token_windows
from isogrid.errors import BudgetError, IsogridError
from isogrid.evaluation import peak_memory_bytes, perplexity
from isogrid.formats import Armor, Budget, Format, SemiStructured, as_format, registered
from isogrid.linear import linear_matrix
from isogrid.report import progress, write_report
from isogrid.studies.rows import Say, gap, heading, remembered, row_of

STORED = torch.bfloat16
BLOCK = 32
AT_PATTERN, AT_BYTES = "2:4", "bytes of ARMOR"


@dataclass(frozen=True)
class Method:
    """One row: a format at a size, fitted by a solver.

    Attributes:
        key: its name on the command line.
        label: its name in the table.
        format: a format, or its name where the bytes choose the size.
        rung: which sizes it is compared at.
        options: of the fit.
    """

    key: str
    label: str
    format: Format | str
    rung: str
    options: Mapping[str, Any] = field(default_factory=dict)


PATTERN = SemiStructured(2, 4)
WRAPPED = Armor(BLOCK, 2, 4)
METHODS = (
    Method("magnitude", "Magnitude", PATTERN, AT_PATTERN, {"solver": "magnitude"}),
    Method("wanda", "Wanda", PATTERN, AT_PATTERN, {"solver": "wanda"}),
    Method("nowag", "NoWag-P", PATTERN, AT_PATTERN, {"solver": "nowag"}),
    Method("sparsegpt", "SparseGPT", PATTERN, AT_PATTERN, {"solver": "sparsegpt"}),
    Method("sweeps", "Exact sweeps", PATTERN, AT_PATTERN),
    Method("armor_proxy", "ARMOR, its own objective", WRAPPED, AT_BYTES, {"solver": "proxy", "rounds": 10}),
    Method("armor", "ARMOR, outputs' error", WRAPPED, AT_BYTES, {"rounds": 10}),
    Method("sparse", "Sparse, any pattern", "sparse", AT_BYTES),
    Method("dense_sparse", "DSFormer", "dense_sparse", AT_BYTES, {"rounds": 10}),
    Method("low_rank_light", "Low-Rank Light", "low_rank_light", AT_BYTES),
    Method("blast", "BLAST", "blast", AT_BYTES),
    Method("gptq", "GPTQ", "quantized", AT_BYTES),
    Method("trit_planes", "Trit-planes", "trit_planes", AT_BYTES),
)


def methods_of(chosen: Sequence[str]) -> list[Method]:
    """The methods by name, all without names; those whose format is not registered here are left out of all.

    Raises:
        IsogridError: unknown name.
    """
    known = [one for one in METHODS if isinstance(one.format, Format) or one.format in registered()]
    unknown = sorted({*chosen} - {one.key for one in known})
    if unknown:
        raise IsogridError(f"sparsity has no method {unknown[0]!r}; it has {', '.join(one.key for one in known)}")
    return [one for one in known if not chosen or one.key in chosen]


def planned(method: Method, layers: Mapping[str, nn.Module]) -> Plan:
    """The member of each layer: the method's own, or the largest within the bytes of ARMOR on that layer."""
    members = {}
    for name, layer in layers.items():
        m, n = linear_matrix(layer).shape
        if isinstance(method.format, Format):
            members[name] = method.format
            continue
        budget = Budget(bytes=WRAPPED.cost(m, n, STORED).bytes, dtype=STORED)
        try:
            members[name] = as_format(method.format).sized(m, n, budget)
        except BudgetError as error:
            raise IsogridError(f"layer {name!r}: {error}") from error
    return Plan(members, tuple(dict.fromkeys(members.values()))[:1], method.rung)


def bits_of(plan: Plan, layers: Mapping[str, nn.Module]) -> float:
    """Bits an entry of the selected matrices, at 16-bit numbers."""
    bits = entries = 0
    for name, layer in layers.items():
        m, n = linear_matrix(layer).shape
        bits += plan.members[name].cost(m, n, STORED).bits
        entries += m * n
    return bits / entries


def run_sparsity(
    out: Path,
    *,
    methods: Sequence[str] = (),
    full: bool = False,
    quick: bool = False,
    seed: int = 0,
    data_dir: Path | None = None,
    command: str = "isogrid study sparsity",
    say: Say = print,
) -> dict[str, Any]:
    """Pruners at 2:4, and formats at ARMOR's bytes, on SmolLM2.

    Args:
        out: folder of the table. Rows are kept in ``runs/study/sparsity`` and not measured again.
        methods: only these.
        full: each layer is fitted on the inputs that it gets from the part already compressed: twice the time.
        quick: few windows, and the first two blocks alone are compressed.
        seed: of the fits' randomness.
        data_dir: where WikiText-2 is looked up first.
        command: the command line, for the page.
        say: told what happens.

    Returns:
        The data of the table.
    """
    chosen = methods_of(methods)
    minutes = (0.5 if quick else 6) * len(chosen) * (2 if full else 1)
    say(f"{len(chosen)} rows; about {minutes:.0f} minutes on two cores, less for rows that are there already")
    model, tokenizer = load_pretrained("smollm2-135m")
    windows = partial(_windows, tokenizer, data_dir)
    calibration = windows("wikitext2:calibration", 8 if quick else 64)
    evaluation = windows("wikitext2:evaluation", 4 if quick else 32)
    other = windows("pydoc", 4 if quick else 16)
    layers = select_layers(model)
    if quick:
        layers = {name: layer for name, layer in layers.items() if ".0." in name or ".1." in name}
    settings: dict[str, Any] = {
        "calibration": f"{len(calibration)} windows of 512 tokens",
        "inputs": "those of the compressed part" if full else "those of the original model",
        "evaluation": f"{len(evaluation)} windows of the other half of the articles",
        "other domain": f"{len(other)} windows of Python's documentation, never calibrated on",
        "layers": "the first two blocks" if quick else "all linear layers of the blocks",
        "block of ARMOR": BLOCK,
        "seed": seed,
    }
    runs = Path("runs/study/sparsity")
    moments: Moments | None = None

    def measured(of: nn.Module) -> dict[str, Any]:
        return {
            "quality": perplexity(of, evaluation).perplexity,
            "other_quality": perplexity(of, other).perplexity,
        }

    def dense_row() -> dict[str, Any]:
        return {
            "label": "Dense",
            "format": "dense",
            "achieved_keep": 1.0,
            "parameters": dense_parameters(layers),
            "bytes": stored_bytes(model),
            **measured(model),
        }

    def row(method: Method) -> dict[str, Any]:
        nonlocal moments
        if moments is None and not full:
            moments = collect_moments(model, layers, calibration)
        plan = planned(method, layers)
        smaller = copy.deepcopy(model)
        with progress(method.label, len(layers)) as step:
            report = compress(
                smaller,
                plan,
                select=list(layers),
                calibration=calibration if full else moments,
                seed=seed,
                on_layer=lambda layer: step(layer.name),
                **method.options,
            )
        found = row_of(report, method.label, calibrated=True)
        del found["requested_keep"]
        found |= measured(smaller)
        found["rung"] = method.rung
        found["bits"] = bits_of(plan, layers)
        found["gap"] = gap(found["quality"], dense["quality"])
        found["error"] = sum(layer["error"] for layer in found["layers"]) / len(found["layers"])
        found["peak_memory"] = peak_memory_bytes()
        return found

    entries = dense_parameters(layers)
    outside = STORED.itemsize * (count_parameters(model) - entries)

    def sized(of: Mapping[str, Any], bits: float) -> dict[str, Any]:
        """A row whose bytes are those of 16-bit numbers, as its bits are."""
        return {**of, "bytes": outside + round(bits * entries / 8)}

    dense = sized(remembered(runs, "dense", settings, dense_row), 8 * STORED.itemsize)
    say(f"dense: perplexity {dense['quality']:.2f}, other domain {dense['other_quality']:.2f}")
    rows = []
    for method in chosen:
        described = settings | {"format": str(method.format), "options": dict(method.options)}
        found = remembered(runs, method.key, described, partial(row, method))
        last = sized(found, found["bits"])
        rows.append(last)
        say(
            f"{method.label}, {last['bits']:.2f} bits: perplexity {last['quality']:.4g}, other domain "
            f"{last['other_quality']:.4g}, gap {last['gap']:.3f}, mean error {last['error']:.4f}, "
            f"{last['seconds'] / 60:.1f} min"
        )
    model_name = "SmolLM2-135M-Instruct"
    result = {
        **heading(f"Sparse matrices on {model_name}", command, settings, model=model_name),
        "quality": {"name": "perplexity", "better": "lower"},
        "other_quality": {"name": "other domain"},
        "size": "bytes",
        "dense": dense,
        "rows": rows,
        "notes": [*_sizes(rows), *_margins(rows), "Perplexities can't be compared with published ones."],
    }
    write_report(result, out)
    return result


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bits an entry and mean errors of the rows."""
    said = [f"{row['label']} {row['bits']:.2f} ({row['error']:.4f})" for row in rows]
    return [
        "Bits an entry of the selected matrices at 16-bit numbers, masks, codes and scales included, and in brackets "
        f"the mean relative error of the layers' outputs: {'; '.join(said)}.",
        "None of these multiplies faster than dense here where rows are many: zeros and codes save bytes.",
    ]


def _margins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much smaller each gap at 2:4 is than that of SparseGPT, and whether the order is the expected one."""
    by_label = {row["label"]: row for row in rows}
    names = ("Magnitude", "Wanda", "SparseGPT", "Exact sweeps", "ARMOR, outputs' error")
    known = [name for name in names if name in by_label]
    if len(known) < 2:
        return []
    gaps = [by_label[name]["gap"] for name in known]
    order = sorted(known, key=lambda name: by_label[name]["gap"], reverse=True)
    said = "Gaps: " + "; ".join(f"{name} {value:.3f}" for name, value in zip(known, gaps, strict=True)) + "."
    return [said if order == known else f"{said} Not in the order of the literature: {', '.join(order)}."]


def _windows(tokenizer: Any, data_dir: Path | None, name: str, count: int) -> Tensor:
    return token_windows(tokenizer, load_text(name, data_dir), 512, count)
