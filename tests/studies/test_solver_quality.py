import pytest

from isogrid.formats import BlockTensorTrain, LowRank
from isogrid.studies import solver_quality


@pytest.mark.slow
def test_a_small_run_finds_the_optimum_of_low_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(solver_quality, "MEMBERS", (LowRank(4), BlockTensorTrain(1)))
    monkeypatch.setattr(solver_quality, "RESTARTS", 4)
    result = solver_quality.run_solver_quality(tmp_path / "out", quick=True, say=lambda _: None)
    low, train = result["rows"]
    assert low["own_worst"] == pytest.approx(1, abs=1e-8), "whitened SVD is the optimum"
    assert low["general_worst"] == pytest.approx(1, abs=1e-8)
    assert train["within"] == 3
    assert train["general_worst"] <= train["own_worst"]
    assert low["rises"] == train["rises"] == 0
    assert "block_tensor_train(rank=1)" in (tmp_path / "out" / "table.md").read_text()
