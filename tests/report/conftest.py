"""A compression table as a real run gives it: four formats, two calibrations, three sizes, one broken model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

SHAPES = {"attn.c_attn": (2304, 768), "attn.c_proj": (768, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
DENSE_SELECTED = 12 * sum(out * into for out, into in SHAPES.values())
DENSE_BYTES = 497_759_232

# (label, format, calibrated, {keep: perplexity}, size of the relative error)
RESULTS = [
    ("low rank", "low_rank", False, {0.75: 812.4, 0.5: 4.1e4, 0.25: 2.7e7}, 0.42),
    ("low rank", "low_rank", True, {0.75: 33.61, 0.5: 58.92, 0.25: 311.5}, 0.21),
    ("monarch", "monarch", False, {0.75: 240.0, 0.5: 1930.4, 0.25: math.inf}, 0.38),
    ("monarch", "monarch", True, {0.75: 32.08, 0.5: 47.15, 0.25: 204.7}, 0.17),
    ("block tensor-train", "block_tensor_train", True, {0.75: 33.02, 0.5: 51.83, 0.25: 188.2}, 0.19),
    ("low rank light", "low_rank_light", True, {0.75: 32.44, 0.5: 52.7, 0.25: 276.3}, 0.2),
]


def layers(name: str, keep: float, size: float) -> list[dict[str, Any]]:
    result = []
    for block in range(12):
        for index, (kind, (out, into)) in enumerate(SHAPES.items()):
            wave = 1 + 0.35 * math.sin(0.9 * block + index)
            result.append(
                {
                    "name": f"h.{block}.{kind}",
                    "format": f"{name}(blocks=4, rank=36)" if name == "monarch" else f"{name}(rank=211)",
                    "out": out,
                    "in": into,
                    "parameters": int(keep * out * into),
                    "dense_parameters": out * into,
                    "error": min(1.4, size * wave * (0.5 / keep)),
                }
            )
    return result


def rows() -> list[dict[str, Any]]:
    result = []
    for label, name, calibrated, perplexities, size in RESULTS:
        for keep, perplexity in perplexities.items():
            achieved = keep - 0.004 - 0.01 * (name == "monarch")
            selected = int(achieved * DENSE_SELECTED)
            result.append(
                {
                    "label": label,
                    "format": name,
                    "calibrated": calibrated,
                    "requested_keep": keep,
                    "achieved_keep": achieved,
                    "parameters": selected,
                    "bytes": DENSE_BYTES - 4 * (DENSE_SELECTED - selected),
                    "quality": perplexity,
                    "gap": math.log(perplexity) - math.log(30.12),
                    "latency_ms": 412.0 * (0.35 + 0.65 * keep),
                    "latency_ratio": 1 / (0.35 + 0.65 * keep),
                    "seconds": 96.0 + 300 * calibrated,
                    "peak_memory": 2_410_000_000,
                    "folder": f"runs/{name}-{keep}",
                    "layers": layers(name, keep, size),
                    "warnings": [],
                }
            )
    result[2]["warnings"] = ["layer 'h.11.mlp.c_proj': the rank 76 keeps 41% of the spectrum; the model is broken"]
    return result


TABLE: dict[str, Any] = {
    "title": "GPT-2 in four formats",
    "command": "isogrid demo --out results/demo/gpt2 --seed 0",
    "model": "gpt2 (124 M parameters)",
    "created": "2025-06-11T09:30:00+00:00",
    "machine": {"cpu": "8-core x86", "threads": 8, "torch": "2.10.0", "isogrid": "0.1.0"},
    "settings": {
        "calibration text": "articles, first half, 128 windows",
        "evaluation text": "articles, second half",
        "windows": 32,
        "window length": 512,
        "damping": 0.01,
    },
    "quality": {"name": "perplexity", "better": "lower"},
    "dense": {
        "label": "dense",
        "format": "dense",
        "calibrated": False,
        "achieved_keep": 1.0,
        "parameters": DENSE_SELECTED,
        "bytes": DENSE_BYTES,
        "quality": 30.12,
        "gap": 0.0,
        "latency_ms": 412.0,
        "latency_ratio": 1.0,
    },
    "rows": rows(),
    "notes": ["Perplexities are over 32 windows of 512 tokens; they are not comparable with papers."],
}


@pytest.fixture(scope="session")
def table() -> dict[str, Any]:
    """The table itself, to read."""
    return TABLE


@pytest.fixture
def data() -> dict[str, Any]:
    """The table, a copy of its own for each test."""
    return copy.deepcopy(TABLE)


@pytest.fixture
def bare() -> dict[str, Any]:
    """A table with what must be there and nothing else."""
    return {"dense": {}, "rows": [{"label": "monarch"}, {"label": "low rank"}]}
