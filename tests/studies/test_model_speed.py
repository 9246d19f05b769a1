"""The benchmark of models: three tasks, three forms, each beside the dense model; on models small enough to test."""

import pytest
import torch
from transformers import BertConfig, BertModel

from isogrid.errors import IsogridError
from isogrid.report import read_json
from isogrid.studies import model_speed
from tests import models


def encoder():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return BertModel(config).eval()


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISOGRID_SPEED", str(tmp_path / "speed"))
    made = {"smollm2-135m": models.llama, "minilm": encoder}
    monkeypatch.setattr(model_speed, "load_pretrained", lambda name, dtype: (made[name]().to(dtype), None))
    monkeypatch.setattr(model_speed, "PROMPT", 12)
    monkeypatch.setattr(model_speed, "SENTENCES", 2)
    monkeypatch.setattr(model_speed, "LENGTH", 5)
    monkeypatch.setattr(model_speed, "WATCHED", 2)
    monkeypatch.setattr("isogrid.evaluation.tuning.COLD_BYTES", 2**15)
    monkeypatch.setattr("isogrid.evaluation.tuning.MOST_ROUNDS", 1)
    return tmp_path


def test_every_task_in_every_form(small, monkeypatch):
    said = []
    result = model_speed.run_model_speed(small / "out", repeats=3, say=said.append)
    assert len(result["rows"]) == 3 * 2 * 3  # tasks, dtypes, forms
    for row in result["rows"]:
        assert 0 < row["outside"] < 1
        assert row["ms"]["lower"] <= row["ms"]["value"] <= row["ms"]["upper"]
        if row["form"] == "dense":
            assert row["ratio"] == {"value": 1, "lower": 1, "upper": 1}
            assert row["promise"] == 1
        else:
            assert 1 < row["promise"] < 1 / row["outside"] + 1
            assert 0 <= row["planned dense"] <= row["layers"]
    page = (small / "out" / "table.md").read_text()
    assert page.count("| smollm2-135m | decode |") == 6
    assert "planned dense" in page

    def again(*_):
        raise AssertionError("a finished point was measured again")

    monkeypatch.setattr(model_speed, "_measured", again)
    assert model_speed.run_model_speed(small / "out", repeats=3, say=said.append)["rows"] == result["rows"]
    assert read_json(small / "out" / "data.json")["rows"] == result["rows"]


def test_forms_share_what_is_not_rewritten(small):
    forms = model_speed.Forms.of("smollm2-135m", "float32", 0)
    dense, *others = forms.models.values()
    for form in others:
        assert form.get_input_embeddings().weight is dense.get_input_embeddings().weight
        assert form.config.vocab_size == dense.config.vocab_size
        shares = [form.get_submodule(name).cost().parameters for name in forms.layers]
        whole = [dense.get_submodule(name).weight.numel() for name in forms.layers]
        assert all(0.3 * size < share <= 0.5 * size for share, size in zip(shares, whole, strict=True))


@torch.no_grad()
def test_a_decoded_token_is_that_of_the_whole_text(small):
    model = models.llama()
    run, fresh = model_speed._decode(model, 0)
    tokens = model_speed._tokens(model, 1, model_speed.PROMPT + 1, 0)
    wanted = model(input_ids=tokens).logits[:, -1]
    for _ in range(3):  # each time from the same cache
        with fresh():
            torch.testing.assert_close(run(model).logits[:, -1], wanted, rtol=1e-4, atol=1e-5)


def test_bad_threads(small):
    with pytest.raises(IsogridError, match="threads are numbers"):
        model_speed.run_model_speed(small, threads=[0], say=lambda _: None)
