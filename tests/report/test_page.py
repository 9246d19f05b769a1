"""The page: one file, nothing from outside, nothing from the data but text."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest

from isogrid import IsogridError
from isogrid.report import read_json, write_page, write_report
from isogrid.report.page import summary

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

EMPTY = {"meta", "img", "source", "link", "br"}


class Outline(HTMLParser):
    """Start tags with attributes, and whether every tag is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def rows_of(table) -> list:
    """Two sizes of the three: enough to read, and soon drawn."""
    return [row for row in table["rows"] if row["requested_keep"] != 0.5]


@pytest.fixture(scope="module")
def page(tmp_path_factory, table) -> str:
    return write_page({**table, "rows": rows_of(table)}, tmp_path_factory.mktemp("page") / "report.html").read_text()


def without_pictures(page: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)


def test_the_page_asks_nothing_of_the_network(page):
    outline = Outline(page)
    assert outline.open == []
    for _, attributes in outline.tags:
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in outline.tags}
    assert not re.search(r"https?:|//|@import|url\(", without_pictures(page))


def test_the_page_is_accessible(page):
    outline = Outline(page)
    assert outline.named("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in outline.named("meta"))
    assert all(len(image["alt"] or "") > 20 for image in outline.named("img"))
    assert len(outline.named("img")) == 3  # quality, and errors at two keeps
    assert {head.get("scope") for head in outline.named("th")} == {"col", "row"}
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_page_holds_what_the_data_holds(page, table):
    text = without_pictures(page)
    assert table["command"] in text
    assert table["notes"][0] in text
    assert "the rank 76 keeps 41% of the spectrum" in text
    assert "8-core x86" in text
    assert "2.7e7" in text
    assert len(Outline(page).named("details")) == 12
    assert text.count("h.11.mlp.c_proj") == 12 + 1  # and once in a warning
    assert len(Outline(page).named("tr")) == 2 + 12 + 12 * (48 + 2)  # head, dense, rows; layers with head and foot
    assert sum(row.get("class") == "best" for row in Outline(page).named("tr")) == 2


def test_the_summary_names_the_best_at_each_keep(data):
    assert summary(data) == (
        "Best perplexity (dense 30.12, lower is better): calibrated monarch at keep 75%, 32.08 in 82.0% of the bytes; "
        "calibrated monarch at keep 50%, 47.15 in 64.9% of the bytes; "
        "calibrated block tensor-train at keep 25%, 188.2 in 48.5% of the bytes."
    )
    data["rows"] = [{**data["rows"][0], "quality": float("nan")}]
    assert "none with a finite number at keep 75%" in summary(data)


def test_text_of_the_data_is_text_on_the_page(data, tmp_path):
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    data["rows"] = data["rows"][3:4]
    row = data["rows"][0]
    row["layers"] = [{**row["layers"][0], "name": evil, "format": evil}]
    row |= {"label": evil, "folder": evil, "warnings": [evil]}
    data |= {"title": evil, "command": evil, "notes": [evil], "model": evil, "settings": {evil: evil}}
    page = write_page(data, tmp_path / "report.html").read_text()
    outline = Outline(page)
    assert not outline.named("script")
    assert not any("onerror" in attributes for _, attributes in outline.tags)
    assert len(outline.named("img")) == 2
    assert page.count("&lt;script&gt;") >= 9
    assert "{{ 7 * 7 }}" in page


def test_a_report_is_six_files(data, tmp_path):
    data["rows"] = data["rows"][2:9:6]  # 2.7e7 and inf
    paths = write_report(data, tmp_path / "new" / "folder")
    expected = {"data.json", "table.md", "command.txt", "quality.png", "errors.png", "report.html"}
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(paths) == expected
    assert read_json(paths["data.json"]) == data
    assert paths["command.txt"].read_text() == data["command"] + "\n"


def test_bare_data_makes_a_report(bare, tmp_path):
    page = write_report(bare, tmp_path)["report.html"].read_text()
    assert Outline(page).open == []
    assert "None" not in without_pictures(page)


@pytest.mark.parametrize(("module", "left"), [("jinja2", 5), ("matplotlib.figure", 3)])
def test_without_the_extra_the_numbers_are_still_written(data, tmp_path, monkeypatch, module, left):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IsogridError, match=r'pip install "isogrid\[demo\]"'):
        write_report(data, tmp_path)
    assert len(list(tmp_path.iterdir())) == left
    assert (tmp_path / "data.json").exists()


def test_a_page_that_cannot_be_drawn_leaves_the_old_one(data, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    data["rows"][0]["quality"] = "good"
    with pytest.raises((TypeError, IsogridError)):
        write_page(data, path)
    assert path.read_text() == "old"


def test_what_was_predicted_stands_beside_what_came(data, tmp_path):
    assert "Asked for, predicted, achieved" not in write_page(data, tmp_path / "a.html").read_text()
    lines = [{"figure": "gap", "requested": "–", "predicted": "+0.300", "achieved": "+0.281"}]
    text = write_page({**data, "outcome": lines}, tmp_path / "b.html").read_text()
    assert "Asked for, predicted, achieved" in text
    assert text.index("+0.300") < text.index("+0.281")
