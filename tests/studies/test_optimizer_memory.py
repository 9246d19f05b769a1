import csv

import pytest
import torch

from isogrid.optim import predicted_state_bytes, projection_flops
from isogrid.studies import optimizer_memory as study


@pytest.fixture(scope="module")
def hollow():
    with torch.device("meta"):
        return study.DistilBertShapes()


def test_the_model_has_distilberts_shapes(hollow):
    matrices = [parameter for parameter in hollow.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in hollow.parameters() if parameter.ndim == 1]
    assert (len(matrices), len(vectors)) == (40, 64)
    assert sum(vector.numel() for vector in vectors) == 62_210
    assert sum(parameter.numel() for parameter in hollow.parameters()) == 66_955_010


@pytest.mark.parametrize(
    ("rank", "mebibytes"), [(4, 2.9189), (8, 5.3651), (16, 10.2497), (64, 39.5728), (128, 78.6729)]
)
def test_predicted_bytes_are_the_sources(hollow, rank, mebibytes):
    parts = predicted_state_bytes(study.rsvd(hollow, rank))
    assert sum(parts.values()) == study.PUBLISHED[rank]
    assert round(sum(parts.values()) / 2**20, 4) == mebibytes
    bases = {4: 1_168_296, 8: 2_338_632, 16: 4_677_256, 64: 18_713_096, 128: 37_428_232}
    assert parts["basis_left"] == bases[rank]
    assert (
        round(100 * (1 - sum(parts.values()) / study.PUBLISHED_ADAM), 4)
        == {
            4: 99.4286,
            8: 98.9497,
            16: 97.9935,
            64: 92.2532,
            128: 84.5989,
        }[rank]
    )


def test_other_rules_give_the_documents_sizes(hollow):
    wanted = {
        "GaLore, rank 4": 3.584,
        "GaLore, rank 8": 6.695,
        "GaLore, rank 16": 12.909,
        "GaLore, rank 64": 50.212,
        "GaLore, rank 128": 99.951,
        "GaLore, long side, rank 4": 2.703,
        "GaLore, long side, rank 16": 9.393,
        "GaLore, long side, rank 128": 71.837,
        "rSVDAdam, fixed rank 4": 2.94,
        "rSVDAdam, fixed rank 16": 10.30,
        "rSVDAdam, fixed rank 128": 79.01,
        "rSVDAdam, fraction 0.01": 4.76,
        "rSVDAdam, fraction 0.1": 46.91,
        "rSVDAdam, fraction 0.5": 235.07,
    }
    makers = study.optimizers()
    for label, mebibytes in wanted.items():
        found = sum(predicted_state_bytes(makers[label](hollow)).values()) / 2**20
        # To the digits that the document prints.
        assert round(found, 3 if label.startswith("GaLore") else 2) == mebibytes, label


def test_live_state_weighs_what_the_source_says():
    assert sum(study.measured_state(lambda model: study.rsvd(model, 4)).values()) == 3_060_664


@pytest.mark.slow
def test_live_state_of_adam_and_of_the_largest_rank():
    assert sum(study.measured_state(lambda model: study.rsvd(model, 128)).values()) == 82_494_488
    adam = study.measured_state(lambda model: torch.optim.Adam(model.parameters()))
    assert sum(adam.values()) == 535_640_496


def test_flops_are_the_stored_measurements(hollow):
    wanted = {4: 1_044_917_483_520, 8: 1_045_986_170_880, 64: 1_060_939_929_600, 128: 1_078_031_063_040}
    for rank, flops in wanted.items():
        assert study.base_flops() + projection_flops(study.rsvd(hollow, rank)) == flops
    assert study.base_flops() == 1_043_850_362_880
    assert study.sentence_flops() == 935_573_760
    for rank in (4, 16, 64):
        assert study.lora_flops(rank) == 681_632_366_592 + 660_602_880 * rank
        assert study.materialized_flops(rank) == 768_435_585_024 + 63_742_464 * rank
        assert (
            study.factors_flops(rank)
            < study.base_flops()
            < study.base_flops() + projection_flops(study.rsvd(hollow, rank))
        )
    assert [row["rank"] for row in study.flops_table(hollow)] == list(study.RANKS)


def test_the_study_writes_table_csv_and_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    makers = study.optimizers()
    kept = {label: makers[label] for label in ("rSVDAdam, rank 4", "GaLore, rank 4")}
    monkeypatch.setattr(study, "optimizers", lambda: kept)
    result = study.run_optimizer_memory(tmp_path / "out", quick=True, say=lambda _: None)
    assert result["rows"][0]["measured_bytes"] == result["rows"][0]["published_bytes"] == 3_060_664
    assert "| rSVDAdam, rank 4 | 2.9189 |" in (tmp_path / "out" / "table.md").read_text()
    with (tmp_path / "out" / "optimizer_memory.csv").open() as stream:
        assert next(csv.DictReader(stream))["measured_bytes"] == "3060664"
    assert (tmp_path / "out" / "optimizer_memory.png").stat().st_size > 1000
    with (tmp_path / "out" / "flops.csv").open() as stream:
        assert next(csv.DictReader(stream))["rsvd_adam"] == "1044917483520"
