"""Methods beside each other: sizes as stored, stacks, what can't be read, and rows that are kept."""

import json

import pytest
import torch

from isogrid.errors import IsogridError
from isogrid.report import read_json
from isogrid.studies import comparison
from isogrid.studies.comparison import as_method, run_comparison
from isogrid.studies.subjects import figure_of
from tests import models


class Ruler:
    """The mean of the outputs' squares stands for a quality."""

    def __init__(self):
        self.calls = 0

    def measure(self, model, tokenizer, name, step=None):
        self.calls += 1
        with torch.no_grad():
            logits = model(models.tokens(2, 8, seed=1)).logits
        return {"metric": "perplexity", "perplexity": float(logits.square().mean()) + 1}


def run(tmp_path, methods, **options):
    ruler = Ruler()
    result = run_comparison(
        tmp_path / "out", models.llama(), None, "small", methods=methods, yardstick=ruler, say=lambda _: None, **options
    )
    return result, ruler


def test_each_method_keeps_to_the_bytes_and_the_dense_model_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, ruler = run(
        tmp_path, ["low_rank", "monarch", "low_rank(rank=3)", "low_rank | blast"], keep=0.5,
        calibration=models.tokens(16, 16, seed=0), inputs=models.tokens(1, 16, seed=2), repeats=2,
    )  # fmt: skip
    assert ruler.calls == 5
    rows = {row["label"]: row for row in result["rows"]}
    assert all(row["achieved_keep"] <= 0.5 for row in rows.values())
    # Rank 3 was asked for, whatever the budget.
    layers = [one for one in rows["low_rank(rank=3)"].items() if one[0] == "parameters"]
    expected = sum(3 * sum(layer.weight.shape) for layer in comparison.select_layers(models.llama()).values())
    assert layers == [("parameters", expected)]
    dense = result["dense"]
    for row in rows.values():
        assert row["bytes"] == dense["bytes"] - 4 * (dense["parameters"] - row["parameters"])
        assert row["latency_ratio"] > 0
        assert row["peak_memory"] > 0
    assert {"quality.png", "table.md", "report.html"} <= {path.name for path in (tmp_path / "out").iterdir()}
    # Nothing is measured twice.
    again, ruler = run(
        tmp_path, ["low_rank", "monarch"], keep=0.5, calibration=models.tokens(16, 16, seed=0),
        inputs=models.tokens(1, 16, seed=2), repeats=2,
    )  # fmt: skip
    assert ruler.calls == 0
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in result["rows"][:2]]


def test_a_stack_of_steps_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "stack.json"
    file.write_text(json.dumps({"label": "ours", "steps": [{"format": "low_rank", "keep": 0.4}]}))
    result, _ = run(tmp_path, [str(file)], keep=0.9)
    (row,) = result["rows"]
    assert row["label"] == "ours"
    assert 0.3 < row["achieved_keep"] <= 0.4
    assert read_json(tmp_path / "out" / "data.json")["rows"] == result["rows"]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsogridError, match="hashing"):
        as_method("hashing")
    file = tmp_path / "stack.json"
    for described, said in (({"steps": []}, "list of formats"), ({"steps": [{"form": "low_rank"}]}, "step 0")):
        file.write_text(json.dumps(described))
        with pytest.raises(IsogridError, match=said):
            as_method(str(file))
    with pytest.raises(IsogridError, match="low_rank, step 1: "):
        run(tmp_path, ["low_rank"], keep=0.001)
    with pytest.raises(IsogridError, match="nothing was measured"):
        figure_of({})
