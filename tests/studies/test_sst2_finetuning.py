import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from isogrid import IsogridError
from isogrid.cli.studies import study_options
from isogrid.data import load_imdb, load_sst2
from isogrid.evaluation import forget_peak_memory, peak_memory_bytes
from isogrid.models import SentenceClassifier
from isogrid.studies import STUDIES
from isogrid.studies import sst2_finetuning as study
from isogrid.studies.finetuning_methods import METHODS, Setting
from isogrid.studies.finetuning_run import FILES, inputs_with_gradient, step_flops, train_run
from tests.data import needs
from tests.studies import killed_program

PROGRAM = Path(__file__).with_name("killed_program.py")


def test_a_killed_run_resumes_to_the_last_digit(tmp_path):
    method = "default"
    wanted = killed_program.run(tmp_path / "whole", method, 0)
    command = [sys.executable, str(PROGRAM), str(tmp_path / "killed"), method]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    for _ in range(3000):
        if checkpoint.is_file() or program.poll() is not None:
            break
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.4))
    program.send_signal(signal.SIGKILL)
    program.wait()
    interrupted = checkpoint.is_file()
    again = killed_program.run(tmp_path / "killed", method, 3)
    assert interrupted, "killed before it ended"
    assert again["epochs"] == wanted["epochs"]
    for key in ("trainable", "state_bytes", "accounted_bytes"):
        assert again[key] == wanted[key]
    assert not checkpoint.exists()


def interrupt(monkeypatch, folder, method, drawn=0):
    """A run that ends at step 77 and leaves a checkpoint."""
    made = METHODS[method]

    def interrupted(model, optimizer, setting, step):
        if step == 77:
            raise KeyboardInterrupt
        made.after_step(model, optimizer, setting, step)

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, method, dataclasses.replace(made, after_step=interrupted))
        with pytest.raises(KeyboardInterrupt):
            killed_program.run(folder, method, 5, drawn)
    assert (folder / "checkpoint.pt").is_file()


@pytest.mark.parametrize("method", ["factored_svt", "lora_top_r", "svt_fraction"])
def test_an_interrupted_run_resumes_to_the_last_digit(tmp_path, monkeypatch, method):
    wanted = killed_program.run(tmp_path / "whole", method, 0)
    interrupt(monkeypatch, tmp_path / "cut", method)
    assert killed_program.run(tmp_path / "cut", method, 5)["epochs"] == wanted["epochs"]


def test_a_checkpoint_of_other_data_is_left_alone(tmp_path, monkeypatch):
    wanted = killed_program.run(tmp_path / "whole", "lora", 0)
    interrupt(monkeypatch, tmp_path / "cut", "lora", drawn=2)
    assert killed_program.run(tmp_path / "cut", "lora", 5)["epochs"] == wanted["epochs"]


def test_the_peak_of_a_run_is_not_that_of_the_process(tmp_path):
    torch.ones(400 << 20, dtype=torch.uint8)
    before = peak_memory_bytes()
    if not forget_peak_memory():
        pytest.skip("the system counts from the beginning only")
    torch.ones(400 << 20, dtype=torch.uint8)
    row = killed_program.run(tmp_path, "lora", 0)
    assert all(peak["process_peak_bytes"] < before - (200 << 20) for peak in row["peaks"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_accounts_for_itself(tmp_path, method):
    row = killed_program.run(tmp_path, method, 0)
    losses = [entry["train_loss"] for entry in row["epochs"]]
    assert losses[-1] < losses[0]
    for name in ("epoch_loss", "epoch_peak_memory", "flops", "memory_breakdown"):
        with (tmp_path / f"{name}.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert rows
        if name == "memory_breakdown":
            by_part = {entry["part"]: entry for entry in rows}
            state = [entry for part, entry in by_part.items() if part.startswith("state: ")]
            assert sum(int(entry["measured_bytes"]) for entry in state) == row["state_bytes"]
            assert all(entry["predicted_bytes"] == entry["measured_bytes"] for entry in state)


@pytest.mark.parametrize("method", METHODS)
def test_closed_forms_count_what_a_step_multiplies(method):
    encoder = killed_program.make_encoder()
    model = SentenceClassifier(encoder, killed_program.WIDTH)
    METHODS[method].begin(model, Setting(4, 0.01, 7, 0))
    ids = torch.randint(1, killed_program.WORDS, (3, 5), generator=torch.Generator().manual_seed(0))
    below = inputs_with_gradient(model, ids)
    assert model.training
    token, sentence = step_flops(model, below)
    with FlopCounterMode(display=False) as counter:
        model(ids).square().mean().backward()
    counted = counter.get_flop_counts()["Global"]
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)  # attention's own are batched
    assert 15 * token + 3 * sentence == sum(count for operation, count in counted.items() if operation in products)


def test_a_remembered_run_gives_its_four_files_to_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "load_pretrained", lambda _: (killed_program.make_encoder(), killed_program.tokenizer))
    monkeypatch.setattr(study, "_data", lambda *_: (killed_program.sentences(40, 0), killed_program.sentences(16, 1)))
    trained = []
    monkeypatch.setattr(study, "train_run", lambda *given: trained.append(given) or train_run(*given))
    options = {"quick": True, "methods": ["lora"], "ranks": [4], "say": lambda _: None}
    stale = tmp_path / "two" / "lora" / "rank-4" / "seed-0" / FILES[0]
    stale.parent.mkdir(parents=True)
    stale.write_text("epoch,train_loss\n1,0.5\n")
    for out in ("one", "two"):
        study.run_sst2_finetuning(tmp_path / out, **options)
    assert len(trained) == 1
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "lora").rglob("*.csv"))
    assert [path.name for path in files] == sorted(FILES)
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_memory_orders_the_methods(tmp_path):
    rows = {method: killed_program.run(tmp_path / method, method, 0) for method in ("adam", "rsvd_adam", "lora")}
    assert max(rows["lora"]["state_bytes"], rows["rsvd_adam"]["state_bytes"]) < rows["adam"]["state_bytes"]
    assert rows["rsvd_adam"]["trainable"] == rows["adam"]["trainable"] > rows["lora"]["trainable"]


def test_planned_runs_have_seeds_at_one_rank_only():
    runs = study.planned_runs(["adam", "lora"], (4, 16, 64), 0, 3, 16)
    assert runs == [
        *(("adam", 16, seed) for seed in range(3)),
        ("lora", 4, 0),
        *(("lora", 16, seed) for seed in range(3)),
        ("lora", 64, 0),
    ]


def test_unknown_methods_ranks_and_options_are_named(tmp_path):
    with pytest.raises(IsogridError, match="method 'sgd' is unknown; there are adam, lora"):
        study.run_sst2_finetuning(tmp_path, methods=["sgd"])
    with pytest.raises(IsogridError, match="each is at least 1"):
        study.run_sst2_finetuning(tmp_path, ranks=[0])
    with pytest.raises(IsogridError, match=r"--rank 300 is beyond svt_fraction's share .* at most 256"):
        study.run_sst2_finetuning(tmp_path, ranks=[4, 300])
    with pytest.raises(IsogridError, match=r"--rank is given 2 times \(4, 8\); optimizer_quality compares at one rank"):
        STUDIES["optimizer_quality"](tmp_path, ranks=[4, 8])
    with pytest.raises(IsogridError, match="study 'solver_quality' has no --method"):
        study_options("solver_quality", STUDIES["solver_quality"], {"methods": ["lora"], "full": False})
    given = {"methods": ["lora"], "ranks": [16], "full": False, "imdb": None}
    assert study_options("sst2_finetuning", STUDIES["sst2_finetuning"], given) == {"methods": ["lora"], "ranks": [16]}


def test_claims_are_read_from_the_rows():
    def row(method, rank, loss, state=1, whole=1):
        return {
            "method": method,
            "rank": rank,
            "label": method,
            "train_loss": loss,
            "eval_loss": loss,
            "best_eval_loss": loss,
            "accuracy": 0.5,
            "trainable": 1,
            "state_bytes": state,
            "accounted_bytes": whole,
            "memory": {},
        }

    rows = [row("adam", 16, 0.5, state=100), row("lora", 4, 0.6, whole=5), row("lora", 16, 0.4, whole=5)]
    rows += [row("rsvd_adam", 4, 0.5, state=10, whole=9), row("rsvd_adam", 16, 0.3, state=15, whole=9)]
    held = {entry["claim"]: entry["held"] for entry in study.claims(rows)}
    assert list(held.values()) == [True, True, False, True, True, None]
    rows.append(row("rsvd_adam", 64, 0.35, state=25, whole=9))
    held = [entry["held"] for entry in study.claims(rows)]
    assert held[3:5] == [False, False]


def test_sentences_of_sst2(tmp_path):
    needs.dataset("sst2")
    test = load_sst2("test")
    assert len(test) == 872
    assert set(test.labels.tolist()) == {0, 1}
    draws = [test.sample(50, torch.Generator().manual_seed(seed)).texts for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(IsogridError, match="split 'all' is unknown"):
        load_sst2("all")


def test_imdb_from_either_kind_of_folder(tmp_path):
    for label, name in ((1, "pos"), (0, "neg")):
        folder = tmp_path / "archive" / "train" / name
        folder.mkdir(parents=True)
        (folder / "0_1.txt").write_text(f"a <br />film {label}")
    found = load_imdb(tmp_path / "archive")
    assert found.texts == ["a  film 1", "a  film 0"]
    assert found.labels.tolist() == [1, 0]
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text('text,label\n"one, two",1\nthree,0\n')
    assert load_imdb(tmp_path / "table").texts == ["one, two", "three"]
    (tmp_path / "table" / "test.csv").write_text("text,label\nx,good\n")
    with pytest.raises(IsogridError, match="line 2: no columns text and label"):
        load_imdb(tmp_path / "table", "test")
    with pytest.raises(IsogridError, match="holds neither"):
        load_imdb(tmp_path)
