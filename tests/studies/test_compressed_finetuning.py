"""The study of compressed fine-tuning, small."""

import math

import pytest

from isogrid.data import DatasetNotFoundError, find_dataset
from isogrid.errors import IsogridError
from isogrid.studies import run_compressed_finetuning
from isogrid.studies.compressed_finetuning import WAYS


@pytest.mark.slow
def test_every_way_at_equal_bytes(tmp_path, monkeypatch):
    try:
        find_dataset("sst2")
    except DatasetNotFoundError:
        pytest.skip("data set sst2 is not here")
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    result = run_compressed_finetuning(tmp_path / "out", quick=True, say=told.append)
    assert [row["way"] for row in result["rows"]] == list(WAYS)
    assert all(0.4 < row["share"] <= 0.5 for row in result["rows"])
    assert all(row["coded"]["share"] < 0.5 * row["share"] for row in result["rows"])
    assert all(math.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in result["rows"])
    # The same start, the same factors: what the two ways of DSFormer know before tuning is the same.
    plain, through = result["rows"][1:]
    assert plain["before_tuning"]["loss"] == pytest.approx(through["before_tuning"]["loss"], abs=1e-3)
    assert plain["loss"] != through["loss"]
    page = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {way.label} |" in page for way in WAYS.values())
    again: list[str] = []
    assert run_compressed_finetuning(tmp_path / "out", quick=True, say=again.append)["rows"] == result["rows"]


def test_unknown_methods_are_named(tmp_path):
    with pytest.raises(IsogridError, match="method 'pruning' is unknown"):
        run_compressed_finetuning(tmp_path, methods=("pruning",))
