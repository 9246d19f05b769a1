import re
import sys
import types

import pytest
import torch

from isogrid.data import DatasetNotFoundError, hub, load_text, token_windows
from isogrid.errors import IsogridError
from tests.data import needs


def letters(text: str, *, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
    """A tokenizer of one token a letter; a special token betrays that it was asked for."""
    return {"input_ids": ([999] if add_special_tokens else []) + [ord(sign) for sign in text]}


def rows_of(text: str) -> list[str]:
    """The hub's rows of a text: each line is a row, and so is each empty row that stood between two lines."""
    rows: list[str] = []
    for gap, line in re.findall(r"(\n*)([^\n]+\n)", text):
        # Rows are joined by two line feeds, so an empty row adds two.
        empty = len(gap) // 2 if not rows else (len(gap) - 2) // 2
        rows += [""] * empty + [line]
    return rows


def fake_hub(monkeypatch, rows):
    """Stands a library `datasets` in, which knows these rows alone."""
    monkeypatch.setattr(hub, "hub_in_reach", lambda: True)
    module = types.ModuleType("datasets")
    module.load_dataset = lambda path, name, split: rows[path, name, split]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_pydoc_is_there_without_any_data(tmp_path):
    text = load_text("pydoc", tmp_path)
    assert len(text) > 300_000
    assert 'The "assert" statement' in text
    assert text == load_text("pydoc")


def test_wikitext_halves_begin_with_their_articles():
    needs.dataset("wikitext2")
    evaluation, calibration = load_text("wikitext2:evaluation"), load_text("wikitext2:calibration")
    assert evaluation.split("\n")[2] == " = Robert Boulter = "
    assert calibration.split("\n")[1] == " = No. 20 Squadron RAAF = "
    assert "Robert Boulter" not in calibration


def test_shakespeare_is_whole():
    needs.dataset("tiny_shakespeare")
    assert len(load_text("shakespeare")) == 1_115_394


def test_a_path_is_read_and_must_be_utf8(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Ein Gitter trägt.", encoding="utf-8")
    assert load_text(str(file)) == load_text(file) == "Ein Gitter trägt."
    file.write_bytes("trägt".encode("latin-1"))
    with pytest.raises(IsogridError, match=r"text\.txt is not UTF-8"):
        load_text(file)


@pytest.mark.parametrize("source", ["wikitext", "wikitext2", "wikitext2:test", "no/such/file.txt"])
def test_unknown_source_lists_what_there_is(source):
    with pytest.raises(IsogridError, match=r"wikitext2:evaluation.*pydoc.*shakespeare.*path"):
        load_text(source)


def test_windows_follow_each_other_and_the_rest_is_dropped():
    windows = token_windows(letters, "abcdefgh", length=3)
    assert windows.dtype == torch.int64
    assert ["".join(map(chr, window)) for window in windows.tolist()] == ["abc", "def"]
    assert token_windows(letters, "abcdefgh", length=3, limit=1).shape == (1, 3)
    assert token_windows(letters, "abc", length=3, limit=5).shape == (1, 3)


def test_a_short_text_is_an_error():
    with pytest.raises(IsogridError, match="2 tokens, less than one window of 3"):
        token_windows(letters, "ab", length=3)
    with pytest.raises(IsogridError, match="length is 0"):
        token_windows(letters, "ab", length=0)
    with pytest.raises(IsogridError, match="limit is -1"):
        token_windows(letters, "ab", length=1, limit=-1)


def test_the_hub_gives_the_same_halves_as_the_files(tmp_path, monkeypatch):
    needs.dataset("wikitext2")
    halves = {half: load_text(f"wikitext2:{half}") for half in ("evaluation", "calibration")}
    rows = [*rows_of(halves["evaluation"] + halves["calibration"]), ""]
    assert rows[:3] == ["", " = Robert Boulter = \n", ""]
    fake_hub(monkeypatch, {("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): {"text": rows}})
    for half, text in halves.items():
        assert load_text(f"wikitext2:{half}", tmp_path) == text


def test_another_text_from_the_hub_is_refused(tmp_path, monkeypatch):
    fake_hub(monkeypatch, {("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): {"text": ["", " = Else = \n"]}})
    with pytest.raises(IsogridError, match=r"No\. 20 Squadron RAAF"):
        load_text("wikitext2:evaluation", tmp_path)


def test_without_files_and_hub_the_error_names_both(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "hub_in_reach", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DatasetNotFoundError) as caught:
        load_text("wikitext2:evaluation", tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "Salesforce/wikitext" in message
    assert "out of reach" in message


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetNotFoundError, match="pip install datasets"):
        load_text("wikitext2:evaluation", tmp_path)
