"""The study of structured pruning: its rows, the models that it leaves, and that it goes on where it stopped."""

import pytest
import torch

from isogrid.compress.structured_pruning import SavedTimes, pruner
from isogrid.compress.structured_pruning.pruner import levels_of
from isogrid.errors import IsogridError
from isogrid.linear import find_coupled
from isogrid.studies import structured_pruning as study
from tests import models


class Ruler:
    """Outputs beside those of the dense model stand for a quality."""

    calls = 0

    def __init__(self, **_):
        pass

    def measure(self, model, tokenizer, name):
        Ruler.calls += 1
        batch = models.token_batch(3)
        with torch.no_grad():
            found, wanted = (one(**batch).last_hidden_state for one in (model, models.bert()))
        return {"spearman": 1 - float((found - wanted).square().mean())}


def made_up(model, modules, levels, *_, **__):
    return SavedTimes(
        14.0,
        {
            name: {units: 3 * (1 - units / module.units) for units in levels_of(module)}
            for name, module in modules.items()
        },
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = study.Part("none", "small", "none", (8, 8), 2, 8, (0.001, 0.001), 1)
    monkeypatch.setattr(study, "PARTS", {"encoder": part})
    monkeypatch.setattr(study, "load_pretrained", lambda name: (models.bert(), None))
    monkeypatch.setattr(study, "calibration_data", lambda *_, **__: [models.padded_batch(seed) for seed in range(8)])
    monkeypatch.setattr(study, "Yardstick", Ruler)
    monkeypatch.setattr(pruner, "measure_times", made_up)
    monkeypatch.setattr(pruner, "CHECKS", 0)  # no machine's times decide here
    Ruler.calls = 0
    return tmp_path / "out"


def run(out, **options):
    said = []
    return study.run_structured_pruning(out, quick=True, say=said.append, **options), said


def test_rows_models_and_what_is_kept(small):
    result, said = run(small)
    rows = {row["label"]: row for row in result["rows"]}
    assert len(rows) == 3 + len(study.OTHERS) + 1 + 3
    assert Ruler.calls == 1 + len(rows)
    for row in rows.values():
        assert row["predicted_speedup"] >= row["requested_speedup"] - 1e-6
        assert 0 < row["achieved_keep"] < 1
        assert row["latency_ratio"] > 0
        assert len(row["modules"]) <= len(find_coupled(models.bert()))
    # One run leaves three models, smaller and smaller.
    family = [rows[f"ZipLM {speedup:g}×"] for speedup in study.SPEEDUPS]
    assert [row["reloaded"] for row in family] == [True] * 3
    sizes = [row["parameters"] for row in family]
    assert sizes == sorted(sizes, reverse=True)
    assert {path.name for path in (small.parent / "runs/study/structured_pruning/encoder/models").iterdir()} == {
        "1.25x", "1.5x", "2x",
    }  # fmt: skip
    # Training does not change sizes, and never ends behind its start.
    for label in ("ZipLM 2×, then trained", "ZipLM, gradually to 2×"):
        assert rows[label]["distilled"]["after"] <= rows[label]["distilled"]["before"]
    assert rows["ZipLM 2×, then trained"]["parameters"] == rows["ZipLM 2×"]["parameters"]
    assert f"At 1.5×: spearman {rows['ZipLM 1.5×']['quality']:.4g} beside" in result["notes"][0]
    table = (small / "encoder" / "table.md").read_text()
    assert "| Speed asked | Speed predicted | Speed |" in table
    assert any("ZipLM, gradually to 2×: predicted" in line for line in said)
    again, _ = run(small)
    assert Ruler.calls == 1 + len(rows)
    assert again["rows"] == result["rows"]


def test_a_part_that_is_none(small):
    with pytest.raises(IsogridError, match="has the parts encoder; got 'both'"):
        run(small, part="both")


def test_findings_compare_at_equal_measured_speed():
    def row(label, measured, quality, **more):
        return {"label": label, "latency_ratio": measured, "predicted_speedup": 1.5, "quality": quality, **more}

    ours = [("1.25", 1.2, 40.0), ("1.5", 1.6, 90.0), ("2", 2.0, 200.0)]
    rows = [row(f"ZipLM {name}×", at, value, reloaded=True) for name, at, value in ours]
    rows += [row("Uniform widths, refitted 1.5×", 1.4, 79.0), row("Heads and channels by magnitude 1.5×", 2.1, 900.0)]
    (said,) = [one for one in study._findings(rows, "perplexity") if "equal" in one]
    # The geometric mean of 40 and 90, and nothing of a speed outside of what was measured.
    assert said.endswith("rows: 60 where Uniform widths, refitted stands at 79 (1.40×).")
