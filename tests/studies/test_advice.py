"""The advice study: sizes are exact, and what is stored is not measured again."""

from __future__ import annotations

import pytest

from isogrid.report import read_json
from isogrid.studies import advice
from tests.studies.test_quality_ladder import small_subject


def test_predicted_beside_achieved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advice, "stories_subject", small_subject)
    monkeypatch.setattr(advice, "KEEPS", (0.7,))
    monkeypatch.setattr(advice, "gap", lambda quality, dense: quality - dense + 100)  # noise of a toy is no gap
    monkeypatch.setattr(advice.Advisor, "_response", lambda *_: 1.0)
    result = advice.run_advice(tmp_path / "out", quick=True, say=lambda _: None)
    assert len(result["rows"]) == 3
    for row in result["rows"]:
        assert row["predicted_parameters"] == row["parameters"]
        assert row["predicted_bytes"] == row["bytes"]
        assert row["ratio"] == pytest.approx(row["predicted_gap"] / row["gap"])
    assert read_json(tmp_path / "out" / "data.json")["rows"] == result["rows"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("| low_rank_light, ") == 3
    again = advice.run_advice(tmp_path / "out", quick=True, say=lambda _: None)
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in result["rows"]]
