"""Files are whole or absent, and numbers survive them."""

from __future__ import annotations

import json
import math
import os

import pytest

from isogrid import IsogridError
from isogrid.report import read_json, replace_file, write_json


def test_json_round_trips(data, tmp_path):
    assert any(math.isinf(row["quality"]) for row in data["rows"])
    assert read_json(write_json(data, tmp_path / "data.json")) == data


def test_not_finite_numbers_round_trip_and_so_do_words_like_them(tmp_path):
    data = {"a": [math.inf, -math.inf, 1e300, 3], "label": "nan", "b": {"c": "\\inf", "d": "-inf", "e": "infinite"}}
    path = write_json({**data, "n": math.nan}, tmp_path / "data.json")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["a"][:2] == ["inf", "-inf"]
    back = read_json(path)
    assert math.isnan(back.pop("n"))
    assert back == data


def test_a_value_that_is_not_plain_is_named_and_the_old_file_stays(tmp_path):
    path = write_json({"rows": []}, tmp_path / "data.json")
    with pytest.raises(IsogridError, match=r"data\['rows'\]\[1\]\['quality'\] is a complex"):
        write_json({"rows": [{}, {"quality": 1j}]}, path)
    assert read_json(path) == {"rows": []}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = replace_file(tmp_path / "table.md", b"old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table.md"]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_file_that_is_no_table_is_named(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(IsogridError, match=r"data\.json"):
        read_json(path)
