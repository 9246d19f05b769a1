"""The study of budgets in time: its rows are within the limit as predicted, and kept."""

import importlib

import pytest

from isogrid.errors import BudgetError
from isogrid.report import read_json
from isogrid.studies import time_budget
from tests import models

milliseconds = importlib.import_module("isogrid.compress.milliseconds")  # `isogrid.compress` is the function


def test_predicted_beside_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISOGRID_CACHE", str(tmp_path))
    monkeypatch.setattr(time_budget, "MODELS", {"none": 1, "small": 16})
    monkeypatch.setattr(time_budget, "FORMATS", ("low_rank",))
    monkeypatch.setattr(time_budget, "SHARES", (5.0,))
    monkeypatch.setattr(time_budget, "load_pretrained", lambda name: (models.llama(), None))
    monkeypatch.setattr(milliseconds, "_watched", _watched)
    with pytest.raises(BudgetError, match="give something between"):
        time_budget.run_time_budget(tmp_path / "out", quick=True, say=lambda _: None)
    times = {"structured": 0.5, "dense": 1.0}
    monkeypatch.setattr(milliseconds, "compare", lambda *_, **__: times)
    monkeypatch.setattr(milliseconds, "speed_table", lambda: _Empty())
    monkeypatch.setattr(time_budget, "SHARES", (0.8,))
    result = time_budget.run_time_budget(tmp_path / "out", quick=True, say=lambda _: None)
    (row,) = result["rows"]
    assert row["ratio"] == pytest.approx(row["predicted"] / row["measured"])
    assert read_json(tmp_path / "out" / "data.json")["rows"] == result["rows"]
    assert "| small | 16 | low_rank |" in (tmp_path / "out" / "table.md").read_text()
    again = time_budget.run_time_budget(tmp_path / "out", quick=True, say=lambda _: None)
    assert again["rows"] == result["rows"]


def _watched(model, layers, inputs, repeats):
    """Passes of microseconds differ too much to be a test."""
    own = dict.fromkeys(layers, 10000.0)
    return own, dict.fromkeys(own, 16), round(1.5 * sum(own.values()))


class _Empty:
    def times(self, *_, bias):
        return None

    def learn(self, *_, bias):
        pass

    def save(self):
        pass
