"""The figure of a ladder: which tables are one, and where its points stand."""

import pytest

from isogrid.report.ladder import gap_by_rung, is_ladder
from isogrid.report.page import write_report


def row(label, rung, gap, keep=0.6):
    return {
        "label": label, "format": label, "rung": rung, "gap": gap, "requested_keep": keep, "achieved_keep": keep,
        "quality": 10.0 + gap,
    }  # fmt: skip


def table(*rows):
    return {"dense": {"quality": 10.0, "achieved_keep": 1.0}, "rows": list(rows), "quality": {"name": "perplexity"}}


CLIMB = table(
    row("blast", "plain", 8.0), row("blast", "whitened", 2.0), row("low_rank", "plain", 9.0),
    row("low_rank", "anchored", 0.5), row("recipe", "recipe", 1.0),
)  # fmt: skip


def test_a_ladder_has_rungs_and_one_size():
    assert is_ladder(CLIMB)
    assert not is_ladder(table(row("blast", "plain", 8.0)))
    assert not is_ladder(table(row("blast", "plain", 8.0), row("blast", "whitened", 2.0, keep=0.8)))
    assert not is_ladder(table({"label": "blast", "requested_keep": 0.6}, {"label": "monarch", "requested_keep": 0.6}))


@pytest.mark.parametrize("narrow", [False, True])
def test_points_stand_on_their_rungs(narrow):
    (axes,) = gap_by_rung(CLIMB, narrow=narrow).axes
    ticks = [text.get_text().replace("\u00a0", " ") for text in axes.get_xticklabels()]
    assert sorted(ticks) == ["anchored", "plain", "whitened"]
    assert ticks[0] == "plain"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["blast"] == [[0.0, 8.0], [float(ticks.index("whitened")), 2.0]]
    assert drawn["low_rank"] == [[0.0, 9.0], [float(ticks.index("anchored")), 0.5]]
    assert {y for _, y in drawn["recipe"]} == {1.0}
    assert axes.get_yscale() == "log"


def test_a_broken_row_and_an_improvement_are_no_obstacle():
    (axes,) = gap_by_rung(table(row("a", "plain", float("inf")), row("a", "whitened", -0.1))).axes
    assert axes.get_yscale() == "linear"


def test_a_ladders_folder_has_its_picture(tmp_path):
    assert {"ladder.png", "report.html"} <= write_report(CLIMB, tmp_path).keys()
    assert not (tmp_path / "quality.png").exists()
