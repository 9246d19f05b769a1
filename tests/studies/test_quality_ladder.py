"""The ladder climbs: its rungs are what they say, rows are kept, and training ends above where it began."""

from __future__ import annotations

import shutil

import pytest
import torch

from isogrid import IsogridError
from isogrid.compress import Distillation, Refinement
from isogrid.data import DatasetNotFoundError
from isogrid.report import read_json
from isogrid.studies import quality_ladder
from isogrid.studies.quality_ladder import RECIPE, RUNGS, Rung, Subject, run_quality_ladder, rungs_of
from tests import models


def small_subject(*_):
    windows = torch.randint(3, models.VOCABULARY, (28, 24), generator=models.generator(0))
    return Subject(
        "a tiny llama",
        models.llama(),
        windows[:16],
        windows[16:24],
        windows[24:],
        Refinement(steps=30, rows=48, rate=0.01),
        Distillation(steps=30, rows=48, rate=0.01),
    )


def test_all_rungs_of_a_small_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality_ladder, "stories_subject", small_subject)
    said = []
    result = run_quality_ladder(tmp_path / "out", part="stories", quick=True, say=said.append)
    rows = {(row["format"], row["rung"]): row for row in result["rows"]}
    assert {rung for _, rung in rows} == {*RUNGS, RECIPE}
    for row in rows.values():
        assert row["achieved_keep"] <= 0.6
        assert row["other_quality"] > 1
        assert bool(row["blocks"]) == (row["rung"] in (*RUNGS[4:], RECIPE))
    assert rows["low_rank", "plain"]["calibrated"] is False
    # Light holds the same matrices in fewer numbers: at one budget it loses less.
    assert rows["low_rank_light", "whitened"]["gap"] < rows["low_rank", "whitened"]["gap"]
    assert read_json(tmp_path / "out" / "stories" / "data.json")["rows"] == result["rows"]
    table = (tmp_path / "out" / "stories" / "table.md").read_text()
    assert "Other domain" in table
    assert "+ distillation" in table
    # A second run measures nothing again: times are those of the first.
    again = run_quality_ladder(tmp_path / "out", part="stories", quick=True, say=said.append)
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in result["rows"]]


def test_only_some_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality_ladder, "stories_subject", small_subject)
    monkeypatch.setattr(quality_ladder, "RUNGS", ("plain", "whitened"))
    result = run_quality_ladder(tmp_path, part="stories", methods=["low_rank_light"], quick=True, say=lambda _: None)
    assert [(row["format"], row["rung"]) for row in result["rows"]] == [
        ("low_rank_light", "plain"), ("low_rank_light", "whitened"), ("low_rank", RECIPE)
    ]  # fmt: skip
    with pytest.raises(IsogridError, match="no row of 'hashing'; it has low_rank, low_rank_light"):
        run_quality_ladder(tmp_path, part="stories", methods=["hashing"], quick=True)


def test_the_distilled_row_begins_with_its_own_refined_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality_ladder, "stories_subject", small_subject)
    monkeypatch.setattr(quality_ladder, "RUNGS", RUNGS[4:])

    def qualities(seed):
        result = run_quality_ladder(
            tmp_path, part="stories", methods=["low_rank_light"], quick=True, seed=seed, say=lambda _: None
        )
        return [row["quality"] for row in result["rows"]]

    found = qualities(0)
    assert qualities(1) != found  # another run beside it
    for path in (tmp_path / "runs").rglob("*distillation*.json"):
        path.unlink()
    assert qualities(0) == found
    for path in (tmp_path / "runs").rglob("*distillation*.json"):
        path.unlink()
    for path in (tmp_path / "runs").rglob("*refinement*"):
        if path.is_dir():
            shutil.rmtree(path)
    assert qualities(0) == found


def test_parts_are_what_the_text_says():
    assert {one.rung for one in rungs_of("formats", full=True, quick=False)} == set(RUNGS[:3])
    assert len({one.format for one in rungs_of("formats", full=True, quick=False)}) == 10
    steps = rungs_of("steps", full=True, quick=False, keep=0.8)
    assert {one.keep for one in steps} == {0.8}
    assert Rung("low_rank", 0.8, RECIPE) in steps
    assert Rung("low_rank", 0.8, "whitened") in steps
    assert len({one.key for one in steps}) == len(steps)
    with pytest.raises(IsogridError, match="parts formats, steps, stories, auto, welore"):
        rungs_of("all", full=False, quick=False)


def test_the_smallest_model_tells_the_same_stories_every_time():
    try:
        first, second = (quality_ladder.stories_subject(True, None) for _ in range(2))
    except DatasetNotFoundError:
        pytest.skip("stories260k is not here")
    assert torch.equal(first.calibration, second.calibration)
    assert not torch.equal(first.calibration[:8], first.evaluation[:8])
