import pytest
import torch

from isogrid.data import SentencePairs, load_sts
from isogrid.errors import IsogridError
from tests.data import needs
from tests.data.test_text import fake_hub


@pytest.mark.parametrize(("split", "pairs"), [("dev", 1500), ("train", 5749)])
def test_splits_are_whole(split, pairs):
    needs.dataset("stsb")
    loaded = load_sts(split)
    assert len(loaded) == pairs
    assert loaded.scores.dtype == torch.float32
    assert loaded.scores.min() == 0
    assert loaded.scores.max() == 5
    assert all(loaded.first)
    assert all(loaded.second)


def test_first_pair_and_every_eighth():
    needs.dataset("stsb")
    pairs = load_sts()
    assert pairs.first[0] == "A man with a hard hat is dancing."
    assert pairs.second[0] == "A man wearing a hard hat is dancing."
    assert pairs.scores[0] == 5
    eighth = pairs.every(8)
    assert len(eighth) == 188
    assert eighth.second[1] == pairs.second[8]


def test_quotes_and_odd_line_ends_are_text(tmp_path):
    folder = tmp_path / "stsb"
    folder.mkdir()
    file = folder / "sts-dev.csv"
    file.write_text('g\tf\ty\t1\t2.5\tHe said "no\x85.\tShe left.\textra\n', encoding="utf-8")
    pairs = load_sts("dev", tmp_path)
    assert (pairs.first, pairs.second, pairs.scores.tolist()) == (['He said "no\x85.'], ["She left."], [2.5])
    file.write_text("g\tf\ty\t1\t2.5\tone\ttwo\ng\tf\ty\t2\t3.0\tone\n", encoding="utf-8")
    with pytest.raises(IsogridError, match="line 2"):
        load_sts("dev", tmp_path)


def test_the_hub_stands_in(tmp_path, monkeypatch):
    rows = {"sentence1": ["a"], "sentence2": ["b"], "label": [3.5]}
    fake_hub(monkeypatch, {("nyu-mll/glue", "stsb", "validation"): rows})
    pairs = load_sts("dev", tmp_path)
    assert (pairs.first, pairs.second, pairs.scores.tolist()) == (["a"], ["b"], [3.5])


def test_bad_input():
    with pytest.raises(IsogridError, match="'test' is unknown"):
        load_sts("test")
    with pytest.raises(IsogridError, match="2 first sentences, 1 second"):
        SentencePairs(["a", "b"], ["c"], torch.zeros(2))
