import csv
import json
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from isogrid.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["isogrid", "memory", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def test_predicted_is_measured_and_everything_is_written(monkeypatch, capsys, tmp_path, folder):
    methods = ("adamw", "default", "rsvd_adam", "apollo_mini")
    options = [word for method in methods for word in ("--optimizer", method)]
    code, printed, _ = run(
        monkeypatch, capsys, folder, *options, "--rank", 4, "--batch", 3, "--length", 16, "--out", tmp_path, "--json"
    )
    assert code == 0
    rows = json.loads(printed)["rows"]
    assert {row["optimizer"] for row in rows} == set(methods)
    for row in rows:
        assert row["predicted_bytes"] in (row["measured_bytes"], None), row
    unpredicted = {row["part"] for row in rows if row["predicted_bytes"] is None}
    assert unpredicted == {"saved for backward"}
    with (tmp_path / "memory.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(rows)
    table = (tmp_path / "table.md").read_text()
    total = sum(
        row["measured_bytes"]
        for row in rows
        if row["optimizer"] == "adamw" and row["part"] not in ("of which factors", "saved for backward")
    )
    assert f"| adamw | total | {total / 2**20:,.4f} | {total / 2**20:,.4f} |" in table
    assert (tmp_path / "memory.png").stat().st_size > 1000


def test_steps_during_the_backward_pass_hold_one_gradient(monkeypatch, capsys, folder):
    code, printed, _ = run(monkeypatch, capsys, folder, "--optimizer", "default", "--in-backward", "--quick", "--json")
    assert code == 0
    gradients = next(row for row in json.loads(printed)["rows"] if row["part"] == "gradients")
    assert gradients["measured_bytes"] == gradients["predicted_bytes"] == 64 * 32 * 4


def test_bad_input_ends_with_one_line(monkeypatch, capsys, folder):
    code, _, said = run(monkeypatch, capsys, folder, "--optimizer", "sgd", "--quick")
    assert code == 2
    assert "optimizer 'sgd' is unknown; there are adamw, default" in said
    code, _, said = run(monkeypatch, capsys, folder, "--length", 65)
    assert code == 2
    assert "--length 65 is beyond the model's 64 positions" in said
