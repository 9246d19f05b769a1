"""Figures: what is drawn, where, and what is not passed off as a place on an axis."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest

from isogrid import IsogridError
from isogrid.report import error_per_layer, quality_against_size, save_figure
from isogrid.report.figures import layer_kinds
from isogrid.report.series import format_style

pytest.importorskip("matplotlib")


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def drawn(figure) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def test_lines_join_what_belongs_together(data):
    figure = quality_against_size(data)
    assert drawn(figure)["monarch, calibrated"] == [204.7, 47.15, 32.08]  # by size
    assert drawn(figure)["dense, 30.12"] == [30.12, 30.12]
    assert figure.axes[0].get_yscale() == "log"
    assert "%" in figure.axes[0].get_xlabel()
    assert "MB" in quality_against_size(data, against="size").axes[0].get_xlabel()


@pytest.mark.parametrize("narrow", [False, True])
def test_broken_models_stand_at_the_edge_with_their_value(data, narrow):
    figure = quality_against_size(data, narrow=narrow)
    assert {"2.7e7", "inf", "41,000", "off the scale"} <= set(texts(figure))
    assert figure.axes[0].get_ylim()[1] < 41_000
    assert drawn(figure)["low rank"] == [812.4]
    arrows = [line for line in figure.axes[0].lines if line.get_marker() == "^" and line.get_linestyle() == "None"]
    assert len(arrows) == 3
    assert all(0.8 < line.get_ydata()[0] < 1 for line in arrows)  # shares of the axes' height
    assert max(figure.axes[0].get_yticks()) < 3012  # no tick gives the band a scale


def test_labels_do_not_lie_on_each_other(data):
    figure = quality_against_size(data)
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(boxes) > 10
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


def test_higher_is_better_is_linear_and_fails_downwards(data):
    data["quality"] = {"name": "Spearman", "better": "higher"}
    data["dense"]["quality"] = 0.86
    for index, row in enumerate(data["rows"]):
        row["quality"] = math.nan if index == 2 else 0.02 + 0.04 * index
    axes = quality_against_size(data).axes[0]
    assert axes.get_yscale() == "linear"
    arrow = next(line for line in axes.lines if line.get_marker() == "v" and line.get_linestyle() == "None")
    assert arrow.get_ydata()[0] < 0.2
    assert "nan" in [text.get_text() for text in axes.texts]


def test_a_narrow_range_is_linear(data):
    data["rows"] = [row for row in data["rows"] if row["calibrated"] and row["requested_keep"] == 0.75]
    axes = quality_against_size(data).axes[0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] > 25


def test_two_labels_of_one_format_are_two_lines(data):
    more = [{**row, "label": "monarch, 8 blocks"} for row in data["rows"] if row["format"] == "monarch"]
    data["rows"] += more
    names = set(drawn(quality_against_size(data)))
    assert {"monarch, calibrated", "monarch, 8 blocks, calibrated", "monarch, 8 blocks"} <= names


@pytest.mark.parametrize("narrow", [False, True])
def test_a_legend_of_long_names_stays_on_the_page(data, narrow):
    data["rows"] = data["rows"][:4]
    for index, row in enumerate(data["rows"]):
        row["label"] = f"a method whose name is rather long, number {index}"
        row["format"] = row["label"]
    figure = quality_against_size(data, narrow=narrow)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_a_format_looks_the_same_everywhere():
    assert format_style("monarch(blocks=4)") == format_style("monarch") == ("#D55E00", "s")
    assert format_style("a format of tomorrow") == format_style("a format of tomorrow")
    known = [format_style(name) for name in ("low_rank", "low_rank_light", "monarch", "block_tensor_train", "dense")]
    assert len({color for color, _ in known}) == len({marker for _, marker in known}) == 5


def test_no_two_lines_of_a_figure_look_the_same(data):
    row = data["rows"][0]
    names = [f"stored(semi_structured, part={index})" for index in range(12)] + ["semi_structured"] * 12
    data["rows"] = [row | {"label": f"method {index}", "format": name} for index, name in enumerate(names)]
    lines = [line for line in quality_against_size(data).axes[0].lines if line.get_label().startswith("method")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 24
    data["rows"] = data["rows"][-6:]  # methods of one format: told apart by colours, and without colour by markers
    methods = [line for line in quality_against_size(data).axes[0].lines if line.get_label().startswith("method")]
    assert len({line.get_color() for line in methods}) == len({line.get_marker() for line in methods}) == 6


def test_kinds_of_layers_are_told_apart():
    gpt = [f"h.{block}.{kind}.c_proj" for block in (0, 1) for kind in ("attn", "mlp")] + ["h.0.mlp.c_fc", "lm_head"]
    assert layer_kinds(gpt) == {
        "attn.c_proj": {"h.0.attn.c_proj": 0, "h.1.attn.c_proj": 1},
        "mlp.c_proj": {"h.0.mlp.c_proj": 0, "h.1.mlp.c_proj": 1},
        "c_fc": {"h.0.mlp.c_fc": 0},
        "lm_head": {"lm_head": 0},
    }
    bert = ["layer.3.attention.output.dense", "layer.3.output.dense", "layer.3.intermediate.dense"]
    assert list(layer_kinds(bert)) == ["attention.output.dense", "output.dense", "intermediate.dense"]
    towers = layer_kinds(["encoder.0.q", "decoder.0.q", "decoder.1.q"])
    assert [len(members) for members in towers.values()] == [1, 2]
    experts = layer_kinds(["layers.5.experts.0.up", "layers.5.experts.1.up", "layers.6.experts.0.up"])
    assert list(experts["up"].values()) == [0, 1, 2]


def test_errors_have_a_panel_a_kind_in_the_models_order(data):
    figure = error_per_layer(data)  # the smallest keep, of three with as many rows
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    row = next(row for row in data["rows"] if row["label"] == "monarch" and row["requested_keep"] == 0.25)
    expected = [layer["error"] for layer in row["layers"] if layer["name"].endswith("c_fc")]
    line = next(line for line in figure.axes[2].lines if line.get_label() == "monarch")
    assert list(line.get_ydata()) == expected
    assert list(line.get_xdata()) == list(range(12))
    assert "25%" in figure.get_suptitle()
    assert "75%" in error_per_layer(data, keep=0.75).get_suptitle()
    with pytest.raises(IsogridError, match=r"0\.6.*0\.75, 0\.5, 0\.25"):
        error_per_layer(data, keep=0.6)


def test_an_error_above_the_panel_is_written(data):
    data["rows"][2]["layers"][0]["error"] = 317.0
    data["rows"][2]["layers"][4]["error"] = math.nan
    figure = error_per_layer(data)
    assert texts(figure) == ["317.0", "nan"]
    others = [layer["error"] for row in data["rows"] for layer in row["layers"] if layer["error"] < 317]
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1.12 * max(others))


def test_dollars_in_a_label_are_dollars(data):
    data["rows"][3]["label"] = data["rows"][4]["label"] = data["rows"][5]["label"] = "$\\frac$"
    data["rows"][2]["layers"][0]["name"] = "h.0.$\\nope$"
    data["quality"]["name"] = "$\\loss$"
    error_per_layer(data).savefig(io.BytesIO(), format="png", dpi=50)
    quality_against_size(data).savefig(io.BytesIO(), format="png", dpi=50)


def test_bare_rows_give_empty_figures(bare, tmp_path):
    assert "no rows to draw" in texts(quality_against_size(bare))
    assert "no layers to draw" in texts(error_per_layer(bare))
    bare["rows"][0] |= {"achieved_keep": 0.5, "quality": math.nan, "layers": [{"name": "head"}]}
    assert "nan" in texts(quality_against_size(bare))
    save_figure(error_per_layer(bare, narrow=True), tmp_path / "errors.png")


def test_a_figure_is_saved_whole_and_the_same_each_time(data, tmp_path):
    data["rows"] = data["rows"][:4]
    first = save_figure(quality_against_size(data), tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert save_figure(quality_against_size(data), tmp_path / "b.png").read_bytes() == first


def test_without_matplotlib_the_remedy_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(IsogridError, match=r'pip install "isogrid\[demo\]"'):
        quality_against_size(data)


def test_import_is_light_and_pyplot_stays_out():
    code = (
        "import sys, isogrid.report as report; heavy = {'matplotlib', 'jinja2'} & set(sys.modules); assert not heavy\n"
        "report.quality_against_size({'dense': {}, 'rows': []}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
