import math

import pytest
import torch

from isogrid.studies import low_rank_emergence as study
from isogrid.studies import optimizer_quality as quality
from tests.data import needs


def test_welore_ranks_are_the_smallest_sufficient_threshold():
    """Brute force over all thresholds, ties and flat spectra included (WeLore, section 3.2)."""
    draw = torch.Generator().manual_seed(0)
    for trial in range(60):
        spectra = {}
        for name in range(4):
            count = int(torch.randint(1, 9, (1,), generator=draw))
            values = torch.rand(count, generator=draw, dtype=torch.float64)
            values = (values * 4).round() / 4 + 0.1 if trial % 3 == 0 else values
            spectra[str(name)] = values.sort(descending=True).values
        reduction = float(torch.rand(1, generator=draw)) * 0.9
        z = {name: (s - s[-1]) / (s[0] - s[-1]) if s[0] > s[-1] else torch.ones_like(s) for name, s in spectra.items()}
        total = sum(len(values) for values in z.values())
        thresholds = sorted({0.0, *(float(v) for values in z.values() for v in values)})
        enough = [
            k for k in thresholds if sum(int((v < k).sum()) for v in z.values()) >= math.ceil(reduction * total - 1e-9)
        ]
        k = enough[0] if enough else 1.0
        assert study.welore_ranks(spectra, reduction) == {
            name: max(1, int((values >= k).sum())) for name, values in z.items()
        }


def test_the_example_of_the_document():
    index = torch.arange(1, 65, dtype=torch.float64)
    for power, wanted in ((1.5, 3), (0.4, 15)):
        sigma = index**-power
        z = (sigma - sigma[-1]) / (sigma[0] - sigma[-1])
        assert int((z >= 0.175).sum()) == wanted
        ranks = study.welore_ranks({"only": sigma}, (64 - wanted) / 64)
        assert ranks == {"only": wanted}


@pytest.mark.parametrize("directions", [4, 8, 16])
def test_gradients_of_the_linear_example_lose_rank(directions):
    """Document, section 9.3: rank at most the inputs' dimensions, stable rank falls towards 1."""
    rank, first, last = study.linear_toy(directions)
    assert rank == directions
    assert last < first
    assert last < {4: 1.1, 8: 1.3, 16: 2.5}[directions]


def test_overlap_is_one_for_the_same_subspace_and_zero_for_orthogonal_ones():
    q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    assert study.overlap(q[:, :3], q[:, :3] @ turn) == pytest.approx(1)
    assert study.overlap(q[:, :3], q[:, 3:6]) == pytest.approx(0, abs=1e-20)
    assert study.stable_rank(q[:, :4] * torch.tensor([2.0, 1, 1, 1])) == pytest.approx(7 / 4)
    assert study.stable_rank(torch.zeros(3, 2)) == 0


def test_a_quick_run_writes_rows_looks_and_pictures(tmp_path, monkeypatch):
    needs.dataset("tiny_shakespeare")
    monkeypatch.chdir(tmp_path)
    result = study.run_low_rank_emergence(tmp_path / "out", quick=True, say=lambda _: None)
    assert len(result["rows"]) == 2 * 6
    pruned = sum(32 - row["welore_rank"] for row in result["rows"])
    assert pruned >= 0.5 * 12 * 32 > pruned - 12 * 32 * 0.1
    assert all(-1 <= value <= 1 for value in result["correlations"].values())
    for name in ("stable_rank.png", "overlap.png", "spectra.png", "looks.csv", "table.md"):
        assert (tmp_path / "out" / name).stat().st_size > 200
    again = study.run_low_rank_emergence(tmp_path / "out", quick=True, say=lambda _: None)
    assert again["rows"] == result["rows"]


def test_a_quick_comparison_of_methods(tmp_path, monkeypatch):
    needs.dataset("tiny_shakespeare")
    monkeypatch.chdir(tmp_path)
    result = quality.run_optimizer_quality(tmp_path / "out", quick=True, methods=["default"], say=lambda _: None)
    adamw, galore, default = result["rows"]
    assert [row["method"] for row in result["rows"]] == ["adamw", "galore", "default"]
    assert galore["state_bytes"] < default["state_bytes"] < adamw["state_bytes"]
    assert result["gap"] == pytest.approx(galore["loss"] - adamw["loss"])
    if result["gap"] > 0:
        assert (adamw["closed"], galore["closed"]) == (pytest.approx(1), pytest.approx(0))
    assert all(row["loss"] < math.log(65) for row in result["rows"])
