"""Tables say what the rows say, and no more."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from isogrid import IsogridError
from isogrid.report import (
    best_rows,
    console_table,
    format_bytes,
    format_count,
    format_duration,
    format_keep,
    format_percent,
    format_quality,
    layer_table,
    markdown_page,
    markdown_table,
    table_columns,
)


def printed(table, width=100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (format_bytes, 215_300_000, "215.3 MB"),
        (format_bytes, 999_999, "1.0 MB"),
        (format_bytes, 512, "512 B"),
        (format_bytes, None, "–"),
        (format_count, 84_934_656, "84.93 M"),
        (format_count, 9_999, "9,999"),
        (format_quality, 31.4, "31.40"),
        (format_quality, 2.7e7, "2.7e7"),
        (format_quality, 99_999.6, "1.0e5"),
        (format_quality, 1203.6, "1,204"),
        (format_quality, 0.83124, "0.8312"),
        (format_quality, -0.1, "-0.1000"),
        (format_quality, math.inf, "inf"),
        (format_quality, -math.inf, "-inf"),
        (format_quality, math.nan, "nan"),
        (format_quality, None, "–"),
        (format_percent, 0.4962, "49.6%"),
        (format_keep, 0.125, "12.5%"),
        (format_keep, 0.29, "29%"),
        (format_duration, 0.42, "0.4 s"),
        (format_duration, 59.7, "1.0 min"),
        (format_duration, 204, "3.4 min"),
        (format_duration, 7560, "2.1 h"),
    ],
)
def test_numbers_are_written_for_people(write, value, text):
    assert write(value) == text


def test_markdown_has_dense_first_and_one_line_a_row(data):
    head, rule, first, *others = markdown_table(data).splitlines()
    assert cells(first)[0] == "dense"
    assert len(others) == len(data["rows"])
    assert {len(line) for line in (head, rule, first, *others)} == {len(head)}
    rules = dict(zip(cells(head), cells(rule), strict=True))
    assert rules["Keep achieved"].endswith("-:")
    assert not rules["Matrices"].endswith(":")


def test_requested_and_achieved_keep_are_both_there(data):
    head, _, _, first, *_ = markdown_table(data).splitlines()
    row = dict(zip(cells(head), cells(first), strict=True))
    assert (row["Keep asked"], row["Keep achieved"]) == ("75%", "74.6%")


def test_best_row_is_finite_and_within_its_budget(data):
    cheat = {**data["rows"][0], "label": "cheat", "quality": 1.0, "achieved_keep": 0.8}
    data["rows"] += [cheat, {**data["rows"][0], "label": "broken", "quality": math.nan}]
    assert best_rows(data)[0.75]["label"] == "monarch"
    assert "80.0% (over)" in markdown_table(data)
    assert best_rows({**data, "quality": {"name": "Spearman", "better": "higher"}})[0.75]["label"] == "low rank"


def test_a_keep_without_finite_quality_has_no_best_row(data):
    for row in data["rows"]:
        row["quality"] = math.nan
    assert set(best_rows(data)) == {0.75, 0.5, 0.25}
    assert not any(best_rows(data).values())
    assert "**" not in markdown_table(data)


def test_markup_in_a_label_is_text(data):
    data["rows"][0]["label"] = "a|b [red]x[/red] <b>"
    line = markdown_table(data).splitlines()[3]
    assert r"a\|b \[red\]" in line
    assert r"\<b>" in line
    assert "[red]x[/red]" in printed(console_table(data), 200)


def test_columns_nobody_fills_are_left_out(data, bare):
    assert "Latency" in [column.title for column in table_columns(data)]
    for row in (data["dense"], *data["rows"]):
        del row["latency_ms"]
    assert "Latency" not in [column.title for column in table_columns(data)]
    assert [column.title for column in table_columns(bare)] == ["Matrices"]


def test_console_table_fits_a_terminal(data):
    lines = printed(console_table(data), 90).splitlines()
    assert sum("low rank light" in line for line in lines) == 3  # unbroken
    assert any("2.7e7" in line and "24.6%" in line and "25%" in line for line in lines)


def test_layer_table_sums_up(data):
    text = printed(layer_table(data["rows"][6]["layers"]), 90)
    assert "h.11.mlp.c_proj" in text
    assert "monarch(blocks=4, rank=36)" in text
    assert "48 layers" in text
    assert "63.70 M" in text  # 0.75 of 84.93 M


def test_layer_table_of_nameless_layers():
    assert "1 layer" in printed(layer_table([{"error": math.nan}]))


def test_page_of_markdown_holds_command_notes_and_warnings(data):
    page = markdown_page(data)
    assert f"    {data['command']}\n" in page
    assert data["notes"][0] in page
    assert "low rank at keep 25%: layer 'h.11.mlp.c\\_proj'" in page.replace("c_proj", "c\\_proj")
    assert "window length: 512" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": None}, "'rows'"),
        ({"dense": None}, "'dense'"),
        ({"rows": [{"format": "monarch"}]}, r"rows\[0\] has no 'label'"),
        ({"quality": {"name": "loss", "better": "less"}}, "'lower' or 'higher'"),
    ],
)
def test_what_must_be_there_is_named(data, change, said):
    with pytest.raises(IsogridError, match=said):
        markdown_table({**data, **change})
