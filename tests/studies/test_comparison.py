"""Methods beside each other: sizes as stored, stacks, what can't be read, and rows that are kept."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from isogrid.compress.structured_pruning import SavedTimes
from isogrid.compress.structured_pruning.pruner import levels_of
from isogrid.errors import IsogridError
from isogrid.formats import Quantized, Stored
from isogrid.linear import find_coupled
from isogrid.report import read_json
from isogrid.studies import comparison
from isogrid.studies.comparison import run_comparison
from isogrid.studies.stacks import as_method, pruned_to
from isogrid.studies.subjects import figure_of
from tests import models


def made_up(model):
    """Times by width, so that no machine decides a test."""
    saved = {
        name: {units: 3 * (1 - units / module.units) for units in levels_of(module)}
        for name, module in find_coupled(model).items()
    }
    return SavedTimes(14.0, saved)


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
        tmp_path, ["low_rank", "monarch", "low_rank(rank=3)", "low_rank | monarch"], keep=0.5,
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


@pytest.mark.parametrize("spelled", ["sparse(density=0.25)", "permuted(inner=sparse(density=0.25))"])
def test_a_given_density_is_kept(tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    result, _ = run(tmp_path, [spelled], keep=0.9)
    layers = comparison.select_layers(models.llama()).values()
    assert result["rows"][0]["parameters"] == sum(layer.weight.numel() // 4 for layer in layers)


def test_a_stack_of_steps_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "stack.json"
    file.write_text(json.dumps({"label": "ours", "steps": [{"format": "low_rank", "keep": 0.4}]}))
    result, _ = run(tmp_path, [str(file)], keep=0.9)
    (row,) = result["rows"]
    assert row["label"] == "ours"
    assert 0.3 < row["achieved_keep"] <= 0.4
    assert read_json(tmp_path / "out" / "data.json")["rows"] == result["rows"]


def test_pruning_alone_and_under_formats(tmp_path, monkeypatch):
    """What a stack keeps is a share of the dense model's matrices, whatever pruning has left of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparison, "prune", partial(comparison.prune, times=made_up(models.llama())))
    stack = tmp_path / "stack.json"
    coded = "stored(inner=low_rank(rank=8), codes=trit_planes(group=16))"
    prune = {"speedup": 1.5, "allocate": "errors", "bias": False}
    found = {}
    for last in ({"format": "low_rank", "keep": 0.3}, {"format": "low_rank", "bytes": 0.3}, {"format": coded}):
        stack.write_text(json.dumps({"label": str(last), "steps": [prune, last]}))
        options = {"calibration": models.tokens(16, 16, seed=0), "inputs": models.tokens(1, 16, seed=2), "repeats": 2}
        result, _ = run(tmp_path, [pruned_to(1.5), str(stack)], **options)
        found["pruned"], found[str(last)] = result["rows"]
    pruned, by_share, by_bytes, coded_row = found.values()
    assert pruned["label"] == "Pruned to 1.5×"
    assert pruned["format"] == "dense, pruned"
    # Biases that were gained count as parameters, not as matrices.
    assert 0.3 < pruned["achieved_keep"] < pruned["parameters"] / result["dense"]["parameters"] < 1
    assert pruned["predicted_speedup"] >= 1.5 - 1e-6
    assert "predicted_speedup" not in by_share  # by times of dense layers: they know nothing of formats
    for row in (by_share, by_bytes):
        assert 0.2 < row["achieved_keep"] <= 0.3
    assert 0 < coded_row["achieved_keep"] < pruned["achieved_keep"]
    assert all(row["latency_ratio"] > 0 and row["seconds"] > 0 for row in found.values())
    # Too large a share, no data, and formats before pruning.
    cases = [
        ([prune, {"format": "low_rank", "keep": 0.99}], {}, r"step 2: 0\.\d+ of the parameters are left before it"),
        ([prune], {"calibration": None}, "step 1: pruning to a speedup measures .* give calibration"),
        ([{"format": "low_rank", "keep": 0.3}, prune], {}, "step 2: .* prune first, then compress"),
    ]
    for steps, other, said in cases:
        stack.write_text(json.dumps({"steps": steps}))
        with pytest.raises(IsogridError, match=said):
            run(tmp_path, [str(stack)], **(options | other))


def test_formats_one_after_the_other_each_for_its_layers(tmp_path, monkeypatch):
    """A share is one of the matrices that the step is for."""
    monkeypatch.chdir(tmp_path)
    stack = tmp_path / "stack.json"
    attention = {"format": "sparse", "keep": 0.3, "select": ["*attn*"]}
    rest = {"format": "sparse", "keep": 0.6}
    described = {"label": "halves", "steps": [attention, rest]}
    stack.write_text(json.dumps(described))
    (row,) = run(tmp_path, [str(stack)], calibration=models.tokens(16, 16, seed=0))[0]["rows"]
    sizes = {name: layer.weight.numel() for name, layer in comparison.select_layers(models.llama()).items()}
    whole = {kind: sum(of for name, of in sizes.items() if kind in name) for kind in ("attn", "mlp")}
    limit = 0.3 * whole["attn"] + 0.6 * whole["mlp"]
    assert 0.99 * limit < row["parameters"] <= limit
    described["steps"] = [attention, rest, rest]  # nothing is left for a third
    stack.write_text(json.dumps(described | {"label": "thirds"}))
    with pytest.raises(IsogridError, match=r"thirds, step 3: .* structured already"):
        run(tmp_path, [str(stack)])


def test_pruning_low_rank_and_eight_bits_in_one_stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = next((Path(__file__).parents[2] / "docs" / "stacks").glob("*_eight_bits.json"))
    monkeypatch.setattr(comparison, "prune", partial(comparison.prune, times=made_up(models.llama()), trials=2))
    seen = []
    compress = comparison.compress

    def watched(model, *args, **options):
        report = compress(model, *args, **options)
        seen.append(comparison.structured_layers(model))
        return report

    monkeypatch.setattr(comparison, "compress", watched)
    (row,) = run(tmp_path, [str(file)], calibration=models.tokens(16, 16, seed=0))[0]["rows"]
    after, last = ({name: layer.format for name, layer in one.items()} for one in seen)
    assert all("attn" in name for name in after)
    assert all(isinstance(fmt, Stored) and fmt.codes == Quantized(bits=8) for fmt in after.values())
    assert {fmt for name, fmt in last.items() if "mlp" in name} == {Quantized(bits=8)}
    assert after.items() <= last.items()
    assert row["achieved_keep"] < 0.4


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "docs" / "stacks").glob("*.json")), ids=str)
def test_the_stacks_of_the_documents_can_be_read(file):
    method = as_method(str(file))
    assert method.label
    assert len(method.steps) > 1


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsogridError, match="hashing"):
        as_method("hashing")
    file = tmp_path / "stack.json"
    cases = (
        ({"steps": []}, "list of formats"),
        ({"steps": [{"form": "low_rank"}]}, "step 0"),
        ({"steps": [{"format": "low_rank", "speedup": 2}]}, "step 0 is .* or speedup, and maybe allocate"),
        ({"steps": [{"speedup": "fast"}]}, "step 0: speedup is a number above 1, got 'fast'"),
        ({"steps": [{"speedup": 1}]}, "speedup is a number above 1, got 1"),
        ({"steps": [{"speedup": 2, "trials": 1.5}]}, "trials is a whole number, got 1.5"),
        ({"steps": [{"speedup": 2, "bias": "no"}]}, "bias is true or false, got 'no'"),
        ({"steps": [{"speedup": 2, "criterion": "luck"}]}, "criterion is one of .*, got 'luck'"),
        ({"steps": [{"speedup": 2, "allocate": "global"}]}, "allocate is one of search, .*, got 'global'"),
        ({"steps": [{"format": 7}]}, "format is a word, got 7"),
        ({"steps": [{"format": "low_rank", "keep": "0.4"}]}, r"keep is a fraction in \(0, 1\), got '0.4'"),
        ({"steps": [{"format": "low_rank", "keep": True}]}, "keep is a fraction"),
        ({"steps": [{"format": "low_rank", "bytes": 1.5}]}, r"bytes is a fraction in \(0, 1\), got 1.5"),
        ({"steps": [{"format": "low_rank", "keep": 0.4, "bytes": 0.4}]}, "keep=0.4 or bytes=0.4, not both"),
        ({"steps": [{"format": "low_rank(rank=30)", "keep": 0.1}]}, "has its size already; leave keep=0.1 out"),
        ({"steps": [{"format": "sparse(density=0.2)", "bytes": 0.1}]}, "has its size already; leave bytes=0.1 out"),
        ({"steps": [{"format": "low_rank(rank=3) | monarch"}]}, "keep chooses the rank; leave rank=3 out"),
        ({"steps": [{"format": "low_rank", "anchor": 2}]}, "anchor is a number between 0 and 1, got 2"),
        ({"steps": [{"format": "low_rank", "refine": 0}]}, "refine is a positive number of minutes, got 0"),
        ({"steps": [{"format": "low_rank", "select": ["*", 3]}]}, "select is a pattern of names, or a list"),
    )
    for described, said in cases:
        file.write_text(json.dumps(described))
        with pytest.raises(IsogridError, match=said):
            as_method(str(file))
    file.write_text(json.dumps({"label": "ours", "steps": [{"format": "low_rank", "select": "*.attention.*"}]}))
    with pytest.raises(IsogridError, match=r"ours, step 1: no linear layer matches '\*.attention.\*'"):
        run(tmp_path, ["monarch", str(file)])
    assert not (tmp_path / "runs").exists(), "said before any work"
    with pytest.raises(IsogridError, match="low_rank, step 1: "):
        run(tmp_path, ["low_rank"], keep=0.001)
    with pytest.raises(IsogridError, match="nothing was measured"):
        figure_of({})


def test_another_model_of_the_same_name_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, ["low_rank"], keep=0.5)
    again, ruler = run(tmp_path, ["low_rank"], keep=0.5)
    assert ruler.calls == 0
    build = models.llama
    changed = build()
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    monkeypatch.setattr(models, "llama", lambda: changed)
    other, ruler = run(tmp_path, ["low_rank"], keep=0.5)
    assert ruler.calls == 2
    assert other["dense"]["quality"] != again["dense"]["quality"]
