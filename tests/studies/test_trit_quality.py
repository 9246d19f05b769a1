"""The study's rows are what they say, are kept, and refuse parts that there are not."""

from __future__ import annotations

import pytest
import torch

from isogrid import IsogridError, select_layers
from isogrid.compress import as_batches
from isogrid.evaluation import perplexity
from isogrid.report import read_json
from isogrid.studies import trit_quality
from isogrid.studies.trit_quality import WAYS, Case, run_trit_quality
from tests import models


def small_case(*_):
    windows = torch.randint(3, models.VOCABULARY, (24, 24), generator=models.generator(0))
    return Case(
        "a tiny llama",
        models.llama(),
        as_batches(windows[:16]),
        "random windows",
        "other ones",
        {"name": "perplexity", "better": "lower"},
        lambda one: perplexity(one, windows[16:]).perplexity,
    )


def test_all_rows_of_a_small_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trit_quality, "_stories", small_case)
    said = []
    result = run_trit_quality(tmp_path / "out", part="stories", quick=True, say=said.append)
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == [way.key for way in WAYS]
    layers = select_layers(small_case().model)
    for way in WAYS:
        row = rows[way.key]
        assert row["calibrated"] == way.calibrated
        assert len(row["layers"]) == len(layers)
        assert row["bytes"] < result["dense"]["bytes"]

    def error(key: str) -> float:  # of the outputs where calibrated, of the matrices elsewhere
        return sum(layer["error"] for layer in rows[key]["layers"])

    assert error("rounded4") < error("plain") < error("published")
    assert error("plain") < error("rounded3")
    assert error("default") < error("feedback") < error("diagonal") <= error("moved")
    assert error("three") < error("default") < error("one")
    again = run_trit_quality(tmp_path / "out", part="stories", quick=True, say=said.append)
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in result["rows"]]
    assert read_json(tmp_path / "out" / "stories" / "data.json")["rows"] == result["rows"]


def test_unknown_parts_are_refused(tmp_path):
    with pytest.raises(IsogridError, match="has the parts encoder, stories, smollm; got 'resnet'"):
        run_trit_quality(tmp_path, part="resnet")
