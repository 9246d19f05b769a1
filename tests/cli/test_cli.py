import json
import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from isogrid.cli import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"[UNK]": 63}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{(7 * i * i + i) % 61}" for i in range(2000)))
    return path


def run(monkeypatch, capsys, *args):
    """(exit code, standard output, standard error) of the command."""
    monkeypatch.setattr(sys, "argv", ["isogrid", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return end.value.code or 0, captured.out, captured.err


def test_compress_evaluate_inspect_report(monkeypatch, capsys, tmp_path, model_folder, text_file):
    out = tmp_path / "small"
    args = ("--format", "low_rank_light", "--keep", 0.7, "--calibrate", text_file, "--length", 64, "--windows", 12)
    code, printed, said = run(monkeypatch, capsys, "compress", model_folder, *args, "--out", out)
    assert code == 0, said
    assert "14 layers as low_rank_light; about" in said
    assert "requested keep 0.7, achieved 0.6" in printed
    described = json.loads((out / "compression.json").read_text())
    size, header = (out / "model.safetensors").stat().st_size, (out / "model.safetensors").read_bytes()[:8]
    assert f"({described['model_bytes']} bytes)" in printed
    assert size - 8 - int.from_bytes(header, "little") == described["model_bytes"]
    assert described["peak_memory"] > 10**8
    assert described["achieved_keep"] <= 0.7
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config["quant_method"] == "isogrid"

    code, printed, _ = run(
        monkeypatch, capsys, "evaluate", out, "--text", text_file, "--length", 64, "--windows", 4, "--json"
    )
    assert code == 0
    found = json.loads(printed)
    assert found["metric"] == "perplexity"
    assert found["tokens"] == 4 * 63
    assert 1 < found["perplexity"] < 200

    code, printed, _ = run(monkeypatch, capsys, "inspect", out, "--json")
    rows = json.loads(printed)
    assert code == 0
    assert sum(row["format"].startswith("low_rank_light") for row in rows) == 14
    assert sum(row["parameters"] for row in rows if "low_rank" in row["format"]) == described["parameters"]

    code, _, said = run(monkeypatch, capsys, "report", out)
    assert code == 0, said
    assert "low_rank_light" in (tmp_path / "small-report" / "report.html").read_text()


def test_dense_export_needs_no_isogrid(monkeypatch, capsys, tmp_path, model_folder):
    out = tmp_path / "dense"
    code, _, said = run(
        monkeypatch, capsys, "compress", model_folder, "--format", "monarch", "--keep", 0.7, "--export", "dense",
        "--out", out,
    )  # fmt: skip
    assert code == 0, said
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_formats_and_doctor_speak_json(monkeypatch, capsys):
    code, printed, _ = run(monkeypatch, capsys, "formats", "--json")
    listed = {entry["name"]: entry for entry in json.loads(printed)}
    assert code == 0
    assert listed["low_rank"]["kept"] <= 0.5
    assert "optimal_under_metric" in listed["low_rank_light"]["traits"]
    assert listed["dense"]["kept"] is None
    code, printed, _ = run(monkeypatch, capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(printed)["isogrid"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "monach"], "did you mean 'monarch'"),
        (["--keep", "1.5"], "between 0 and 1"),
        (["--keep", "0.0001"], "smallest"),
        (["--select", "q_prj"], "did you mean 'q_proj'"),
        (["--export", "onnx"], "--export is structured or dense"),
        (["--calibrate", "no-such-text"], "no-such-text"),
        (["--format", "auto", "--format", "monarch"], "give it alone"),
        (["--keep", "0.5", "--bytes", "10000"], "--keep, --bytes are budgets each: give one of them"),
        (["--refine", "-1"], "--refine takes a positive number of minutes, got -1"),
        (["--distill", "nan"], "--distill takes a positive number of minutes, got nan"),
        (["--recipe", "config.json"], "recipe config.json: not a recipe that advise has written"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(monkeypatch, capsys, tmp_path, model_folder, args, message):
    monkeypatch.chdir(model_folder)
    code, _, said = run(monkeypatch, capsys, "compress", model_folder, *args, "--out", tmp_path / "x")
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["advise", "--target", "2"], "--target is a share of the parameters in (0, 1), got 2"),
        (["advise", "--gap", "-1"], "--gap is above 0, got -1"),
        (["advise", "--bytes", "1000000000"], "--bytes 1000000000: the selected matrices take 61440; give less"),
        (["evaluate", "--metric", "sts"], "LlamaForCausalLM embeds no sentences; --metric sts takes an encoder"),
        (
            ["prune", "--tokens", "4096", "--out", "x"],
            "a pass of 4096 tokens is to be timed, beyond the model's 2048 positions",
        ),
    ],
)
def test_bad_input_of_other_verbs(monkeypatch, capsys, tmp_path, model_folder, text_file, args, message):
    monkeypatch.chdir(tmp_path)
    if args[0] != "evaluate":
        args = [*args, "--calibrate", text_file]
    code, _, said = run(monkeypatch, capsys, args[0], model_folder, *args[1:])
    assert (code, "Traceback" in said) == (2, False)
    assert message in said


def test_a_module_that_is_gone_is_inspected(monkeypatch, capsys, tmp_path):
    from isogrid import save
    from isogrid.checkpoint import PrunedEntry, mark_structured
    from isogrid.linear import find_coupled, shrink
    from tests import models

    model = models.llama()
    found = find_coupled(model)
    name = next(iter(found))
    shrink(model, found[name], [])
    mark_structured(model, pruned={name: PrunedEntry(0, found[name].units)})
    save(model, tmp_path / "pruned")
    code, printed, said = run(monkeypatch, capsys, "inspect", tmp_path / "pruned")
    assert code == 0, said
    assert "–" in printed


def test_a_folder_that_is_no_model(monkeypatch, capsys, tmp_path):
    code, _, said = run(monkeypatch, capsys, "inspect", tmp_path)
    assert code == 2
    assert "config.json" in said


def test_advice_is_followed(monkeypatch, capsys, tmp_path, model_folder, text_file):
    args = ("--calibrate", text_file, "--length", 32, "--windows", 16, "--format", "low_rank_light", "--quick")
    code, printed, said = run(
        monkeypatch, capsys, "advise", model_folder, *args, "--target", 0.7, "--data", tmp_path,
        "--out", tmp_path / "advice", "--json",
    )  # fmt: skip
    assert code == 0, said
    recipes = json.loads(printed)["recipes"]
    assert all(one["command"].endswith(f"--data {tmp_path}") for one in recipes)
    assert len(recipes) == 3
    place = 1 + next(i for i, one in enumerate(recipes) if one["recipe"].endswith("one shot"))
    recipe = tmp_path / f"advice/recipe-{place}.json"
    out = tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["isogrid.compress"],
            "estimate_seconds",
            lambda *_, **__: pytest.fail("the recipe tells the time"),
        )
        code, printed, said = run(monkeypatch, capsys, "compress", model_folder, "--recipe", recipe, "--out", out)
    assert code == 0, said
    predicted = recipes[place - 1]
    assert f"predicted keep {predicted['keep']:.4f}, {predicted['model_bytes']} bytes" in printed
    described = json.loads((out / "compression.json").read_text())
    assert described["parameters"] == predicted["parameters"]
    assert described["model_bytes"] == predicted["model_bytes"]
    found = {}
    for name in (out, model_folder):
        _, printed, _ = run(monkeypatch, capsys, "evaluate", name, "--text", text_file, "--length", 32, "--json")
        found[name] = json.loads(printed)["loss"]
    code, printed, _ = run(
        monkeypatch, capsys, "evaluate", out, "--against", model_folder, "--text", text_file, "--length", 32, "--json"
    )
    both = json.loads(printed)
    assert both["gap"] == pytest.approx(found[out] - found[model_folder])
    assert both["predicted_gap"] == predicted["gap"]
    stored = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(stored | {"calibration": {}}))
    code, _, said = run(monkeypatch, capsys, "compress", model_folder, "--recipe", recipe, "--out", tmp_path / "x")
    assert code == 2
    assert "the recipe's calibration tells no 'source'" in said
    code, _, said = run(monkeypatch, capsys, "advise", model_folder, "--target", 0.7, "--gap", 0.3)
    assert code == 2
    assert "one of --target, --bytes and --gap" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--suite", "cars"), "--suite is one of layers, models, got 'cars'"),
        (("--threads", "1;2"), "--threads is a number or several with commas between, got '1;2'"),
        (("--threads", "0"), "threads are numbers of 1 and more, got [0]"),
        (("--suite", "models", "--full"), "--full is for --suite layers"),
    ],
)
def test_bench_refuses_what_it_cannot_time(monkeypatch, capsys, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    code, _, printed = run(monkeypatch, capsys, "bench", *options)
    assert code != 0
    assert said in " ".join(printed.split())
    assert not list(tmp_path.iterdir())


def test_compare_by_bits_speaks_json(monkeypatch, capsys, tmp_path, model_folder):
    from isogrid.studies.subjects import Yardstick

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Yardstick, "measure", lambda *_: {"metric": "perplexity", "perplexity": 7.0})
    args = (
        "--bits",
        2,
        "--bits",
        4,
        "--method",
        "low_rank",
        "--rows",
        8,
        "--quick",
        "--out",
        tmp_path / "out",
        "--json",
    )
    code, printed, said = run(monkeypatch, capsys, "compare", model_folder, *args)
    assert code == 0, said
    rows = json.loads(printed)["rows"]
    assert [row["label"] for row in rows] == ["low_rank", "quantized(bits=2)", "quantized(bits=4)"]
    assert rows[1]["bytes"] < rows[2]["bytes"]
    assert json.loads((tmp_path / "out" / "data.json").read_text())["rows"] == rows
    code, _, said = run(monkeypatch, capsys, "compare", model_folder, "--bits", 9)
    assert code != 0
    assert "--bits" in said
