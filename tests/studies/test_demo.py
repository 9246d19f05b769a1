import json

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from isogrid.data import DatasetNotFoundError, find_dataset, load_stories260k
from isogrid.report import read_json
from isogrid.studies import demo


class SavableTokenizer:
    """The stories' tokenizer with the one method of transformers' that saving needs."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def save_pretrained(self, folder):
        (folder / "tokenizer.txt").write_text("stories")


@pytest.fixture
def stories(monkeypatch):
    try:
        find_dataset("stories260k")
    except DatasetNotFoundError:
        pytest.skip("data set stories260k is not here")
    model, tokenizer = load_stories260k()
    monkeypatch.setattr(demo, "load_pretrained", lambda name: (model.eval(), SavableTokenizer(tokenizer)))
    monkeypatch.setattr(demo, "LENGTH", 128)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::isogrid.IsogridWarning")
def test_the_demo_measures_saves_and_goes_on_where_it_stopped(stories, tmp_path, monkeypatch):
    said = []
    result = demo.run_demo(tmp_path, windows=8, say=said.append)

    assert [row["requested_keep"] for row in result["rows"]] == [0.8] * 5 + [0.6] * 4
    plain, calibrated = result["rows"][0], result["rows"][1]
    assert plain["format"] == calibrated["format"] == "low_rank"
    assert calibrated["quality"] < plain["quality"]
    for row in result["rows"]:
        assert row["achieved_keep"] <= row["requested_keep"]
        assert row["quality"] >= result["dense"]["quality"] * 0.9
        folder = tmp_path / row["folder"]
        assert AutoModelForCausalLM.from_pretrained(folder).config.quantization_config["layers"]
        size = (folder / "model.safetensors").stat().st_size
        with (folder / "model.safetensors").open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        assert size - 8 - header == row["bytes"]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert any(name.endswith("q_proj.weight") for name in file.keys())  # noqa: SIM118
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert read_json(tmp_path / "data.json")["rows"][3]["label"] == "Monarch"
    assert json.loads((tmp_path / "data.json").read_text())["dense"]["quality"] == result["dense"]["quality"]

    def never(*args, **kwargs):
        raise AssertionError("a finished row was measured again")

    monkeypatch.setattr(demo, "compress", never)
    again = demo.run_demo(tmp_path, windows=8, say=said.append)
    assert again["rows"] == result["rows"]
