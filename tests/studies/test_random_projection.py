import math

import pytest

from isogrid.studies import random_projection


def test_members_have_the_published_sizes():
    counts = {}
    for label, fmt, reference, _ in random_projection.members(quick=False):
        counts.setdefault(label, []).append((fmt.cost(1296, 1296).parameters, reference))
    # The thesis counts 1296 bias entries too.
    assert counts["Low rank"][0][0] + 1296 == 42768
    assert counts["Low-Rank Light"][-1][0] + 1296 == 1606928
    assert counts["Block Tensor-Train"][0][0] + 1296 == 94608
    assert [parameters + 1296 for parameters, _ in counts["Monarch (rank one)"]] == [
        94608, 102384, 127008, 221616, 426384, 565056, 843696,
    ]  # fmt: skip
    assert counts["BLAST 8 x 8"][1][0] + 1296 == 171280
    assert all(0 < reference < 1 for sizes in counts.values() for _, reference in sizes)


def test_half_the_rank_of_a_gaussian():
    assert random_projection._marchenko_pastur(0.5) == pytest.approx(0.3260, abs=2e-4)
    assert random_projection._marchenko_pastur(0.25) == pytest.approx(0.6141, abs=2e-4)


def test_a_small_run_meets_theory_and_is_not_repeated(tmp_path, monkeypatch):
    from isogrid.formats import LowRank, Unstructured

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random_projection, "SIDE", 144)
    few = [("Low rank", LowRank(72), 0.326, {}), ("Unstructured", Unstructured(0.5), 0.2671, {})]
    monkeypatch.setattr(random_projection, "members", lambda quick: iter(few))
    result = random_projection.run_random_projection(tmp_path / "out", say=lambda _: None)
    for row in result["rows"]:
        assert row["quality"] == pytest.approx(row["reference"], rel=0.05)
        assert math.isclose(row["achieved_keep"], row["parameters"] / 144**2)
    monkeypatch.setattr(LowRank, "solve", None)
    again = random_projection.run_random_projection(tmp_path / "out", say=lambda _: None)
    assert again["rows"] == result["rows"]
    assert "Published" in (tmp_path / "out" / "table.md").read_text()
