"""The page of one compressed model tells what was measured of it."""

from __future__ import annotations

import pytest

from isogrid import compress
from isogrid.compress import Distillation, Refinement
from isogrid.report import markdown_table
from isogrid.studies.rows import page_of_compression
from tests import models


@pytest.fixture(scope="module")
def described():
    data = [models.token_batch(seed) for seed in range(6)]
    report = compress(
        models.llama(),
        "low_rank",
        calibration=data,
        refine=Refinement(steps=5, rows=48),
        distill=Distillation(steps=5, rows=48),
    )
    return report.to_dict() | {"model": "a tiny llama", "command": "isogrid compress"}


@pytest.mark.parametrize(
    ("measured", "name", "better"),
    [
        ({"perplexity": 31.25, "loss": 3.44, "dense_perplexity": 28.5, "gap": 0.092}, "perplexity", "lower"),
        ({"spearman": 0.8125, "dense_spearman": 0.875}, "spearman", "higher"),
        ({"heatmap_fidelity": 0.9375}, "heatmap fidelity", "higher"),
    ],
)
def test_what_evaluate_found_is_told(described, measured, name, better):
    page = page_of_compression(described, measured)
    assert page["quality"] == {"name": name, "better": better}
    key = name.replace(" ", "_")
    assert page["rows"][0]["quality"] == measured[key]
    assert page["dense"].get("quality") == measured.get(f"dense_{key}")
    assert "was not measured" not in page["notes"][0]
    table = markdown_table(page)
    assert name[1:] in table
    assert all(f"{value:.4g}" in table for figure, value in measured.items() if figure not in ("loss", "gap"))
    assert ("+0.092" in table) == ("gap" in measured)


def test_what_was_not_measured_is_said(described):
    page = page_of_compression(described)
    assert "quality" not in page
    assert "the model's quality was not measured: isogrid evaluate does." in page["notes"][0]


def test_what_training_has_brought(described):
    lines = {line["figure"]: line["achieved"] for line in page_of_compression(described)["outcome"]}
    middle = [sum(block[key] for block in described["blocks"]) / 2 for key in ("before", "after")]
    assert lines["median error of a refined block"] == f"{middle[0]:.4f} → {middle[1]:.4f}"
    reached = described["distilled"]
    assert lines["distance from the dense model, distilled"] == f"{reached['before']:.4f} → {reached['after']:.4f}"
