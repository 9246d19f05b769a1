import math

import pytest
import torch

from isogrid.formats import LowRank, Sparse
from isogrid.studies import random_projection
from isogrid.studies.projection_targets import TARGETS, Entry, Target, low_rank_law, picture, sparse_law


def test_members_have_the_published_sizes():
    counts = {}
    for entry in TARGETS["gaussian-1296"].entries(False):
        counts.setdefault(entry.label, []).append(entry.format.cost(1296, 1296).parameters)
        assert 0 < entry.published < 1
    # The thesis counts 1296 bias entries too.
    assert counts["Low rank"][0] + 1296 == 42768
    assert counts["Low-Rank Light"][-1] + 1296 == 1402128
    assert counts["Block Tensor-Train, strided rows"][0] + 1296 == 94608
    assert [parameters + 1296 for parameters in counts["Monarch (rank one)"]] == [
        94608, 102384, 127008, 221616, 426384, 565056, 843696,
    ]  # fmt: skip
    assert counts["BLAST 8 x 8"][1] + 1296 == 171280


def test_laws_of_large_matrices():
    assert low_rank_law(0.5) == pytest.approx(0.3260, abs=2e-4)
    assert low_rank_law(0.25) == pytest.approx(0.6141, abs=2e-4)
    assert [sparse_law(p) for p in (0.1, 0.3, 0.5)] == pytest.approx([0.7488, 0.4655, 0.2671], abs=1e-4)


def test_the_documented_picture():
    assert float(picture(None).norm()) == pytest.approx(95.359, abs=5e-4)


@pytest.mark.parametrize("name", ["gaussian-256", "picture"])
def test_closed_forms_meet_the_errors_documented_for_the_same_matrix(name):
    target = TARGETS[name]
    matrix = target.matrix(None)
    for entry in target.entries(False):
        if entry.format.traits.optimal and entry.published is not None:
            dealt = matrix.view(entry.deal, -1, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape)
            _, report = entry.format.fit_and_report(dealt)
            digits = 5e-4 if name == "picture" else 1e-4
            assert report.error == pytest.approx(entry.published, abs=digits), entry


def test_a_small_run_meets_theory_and_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [Entry("Low rank", LowRank(72), 0.326, 0.326), Entry("Sparse", Sparse(0.5), 0.2671)]
    target = Target(
        "Small", "144 x 144", lambda _: torch.randn(144, 144, dtype=torch.float64), lambda _: iter(few), False
    )
    torch.manual_seed(0)
    monkeypatch.setattr(random_projection, "TARGETS", {"small": target})
    result = random_projection.run_random_projection(tmp_path / "out", say=lambda _: None)["small"]
    for row in result["rows"]:
        assert row["quality"] == pytest.approx(row["reference"], rel=0.05)
        assert math.isclose(row["achieved_keep"], row["parameters"] / 144**2)
    assert result["rows"][0]["least_error"] == pytest.approx(result["rows"][0]["quality"])
    torch.manual_seed(0)
    monkeypatch.setattr(LowRank, "solve", None)
    again = random_projection.run_random_projection(tmp_path / "out", say=lambda _: None)["small"]
    assert again["rows"] == result["rows"]
    assert "Published" in (tmp_path / "out" / "small" / "table.md").read_text()
