"""Pictures of blocks: every format's is drawn, legible and in the colours of its blocks."""

from __future__ import annotations

import io

import numpy as np
import pytest

from isogrid import Blast, BlockDiagonal, LowRank, Monarch, Permuted, Sum, TensorTrain
from isogrid.formats import registered
from isogrid.formats.anatomy import anatomy
from isogrid.report import block_picture, block_text, picture_sheet
from isogrid.report.blocks import colored_factors
from isogrid.report.canvas import png_bytes
from tests.formats.cases import middle_member

pytest.importorskip("matplotlib")


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def pixels(figure):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png_bytes(figure))).convert("RGB"))


@pytest.mark.parametrize("name", list(registered()))
@pytest.mark.parametrize(("m", "n"), [(24, 16), (13, 7), (7, 40)])
def test_every_format_is_drawn_and_every_factor_named(name, m, n):
    found = anatomy(middle_member(name, m, n), m, n)
    figure = block_picture(found)
    said = texts(figure)
    assert "=" in said
    for factor in found["factors"]:
        assert factor["name"] in said
        assert " × ".join(map(str, factor["shape"])) in said or factor["shape"] == []
    assert f"{found['parameters']:,} parameters" in " ".join(said)
    image = pixels(figure)
    assert (image < 250).any(axis=2).mean() > 0.02  # no empty canvas
    edge = np.concatenate([image[:4].reshape(-1, 3), image[-4:].reshape(-1, 3), image[:, :4].reshape(-1, 3)])
    assert (edge == 255).all()  # nothing runs off it


@pytest.mark.parametrize(
    "fmt", [Monarch(rank=1), Sum((LowRank(rank=2), Monarch(rank=1))), Permuted(Monarch(rank=1)), TensorTrain(rank=4)]
)
def test_no_words_lie_over_each_other(fmt):
    figure = block_picture(anatomy(fmt, 24, 16))
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts]
    for place, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.width, text
        for other, its in boxes[place + 1 :]:
            assert not box.overlaps(its), (text, other)


def test_terms_of_a_sum_have_a_plus_between():
    said = texts(block_picture(anatomy(Sum((LowRank(rank=1), Monarch(rank=1))), 8, 8)))
    assert said.count("+") == 1
    assert said.count("·") == 2
    assert "+" not in texts(block_picture(anatomy(Monarch(rank=1), 8, 8)))


def test_blocks_have_their_own_colours_and_blocks_of_padding_none():
    (diagonal,) = colored_factors(anatomy(BlockDiagonal(blocks=5), 13, 7))
    assert diagonal.colors[-1] is None  # inputs 8 and 9 of 7
    assert len(set(diagonal.colors)) == 5
    said = " ".join(texts(block_picture(anatomy(BlockDiagonal(blocks=5), 13, 7))))
    assert "hatched blocks reach no entry" in said
    assert "does not reach are white" in said
    for factor in colored_factors(anatomy(Blast(rank=3), 24, 16)):
        assert len(set(factor.colors)) == 4


def test_blocks_that_reach_the_same_entries_are_tints():
    core = colored_factors(anatomy(TensorTrain(rank=2), 12, 6))[1]
    assert len(core.colors) == len(set(core.colors)) == 6  # two bonds, three digits
    assert len(core.kinds) == 3
    assert (core.counts == 2).all()


def test_text_shows_rows_in_turn_and_columns_in_runs():
    lines = block_text(anatomy(Monarch(blocks=2, rank=1), 4, 4)).splitlines()
    assert lines[0].split() == ["right", "left"]
    assert [line.split() for line in lines[2:]] == 2 * [["████░░░░", "████████"], ["████░░░░", "░░░░░░░░"]]
    lines = block_text(anatomy(BlockDiagonal(blocks=2), 4, 4)).splitlines()
    assert lines == ["diagonal", "1 of 2 blocks an entry", "████· ·", "████· ·", "· · ░░░░", "· · ░░░░"]


def test_text_keeps_to_the_width():
    found = anatomy(Blast(rank=2), 16, 16)
    for width in (40, 80, 120):
        assert max(map(len, block_text(found, width=width).splitlines())) <= width


def test_a_sheet_holds_every_picture():
    figure = picture_sheet([("one", np.zeros((4, 6, 3))), ("two", np.ones((4, 6, 3)))], columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
