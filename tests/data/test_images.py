import importlib.metadata

import pytest
import torch

from isogrid.data import load_photographs, open_photographs, prepare_image
from isogrid.data.images import SCIKIT_IMAGE_PHOTOGRAPHS
from isogrid.errors import IsogridError
from tests.data import needs

# What black becomes: -mean / deviation of ImageNet's channels.
BLACK = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def test_every_photograph_is_in_the_package():
    needs.package("scikit-image")
    files = {file.stem for file in importlib.metadata.files("scikit-image") if "skimage/data/" in file.as_posix()}
    assert {name for name in SCIKIT_IMAGE_PHOTOGRAPHS if name != "motorcycle"} <= files
    assert "motorcycle_left" in files


def test_scikit_image_photographs():
    pytest.importorskip("skimage")
    photographs = open_photographs()
    assert tuple(photographs) == SCIKIT_IMAGE_PHOTOGRAPHS
    assert photographs["coffee"].size == (600, 400)
    assert {image.mode for image in photographs.values()} == {"RGB"}


def test_kodak_photographs():
    pytest.importorskip("PIL")
    needs.dataset("kodak")
    assert load_photographs("kodak", limit=3).shape == (3, 3, 224, 224)
    assert len(open_photographs("kodak")) == 24


def test_a_wide_picture_is_centred_on_black():
    image = pytest.importorskip("PIL.Image").new("RGB", (400, 200), (255, 255, 255))
    prepared = prepare_image(image, 56)
    assert prepared.dtype == torch.float32
    rows = prepared.mean(dim=2)  # (3, 56)
    torch.testing.assert_close(rows[:, :14], BLACK[:, None].expand(3, 14))
    torch.testing.assert_close(rows[:, 42:], BLACK[:, None].expand(3, 14))
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(rows[:, 14:42], white[:, None].expand(3, 28))


def test_channels_and_sides_stay_in_order():
    image = pytest.importorskip("PIL.Image").new("RGB", (56, 56))
    image.paste((255, 0, 0), (0, 0, 28, 28))
    prepared = prepare_image(image, 28)
    assert prepared[0, 0, 0] > 2  # red, top left
    torch.testing.assert_close(prepared[:, 0, 27], BLACK)
    torch.testing.assert_close(prepared[:, 27, 0], BLACK)
    torch.testing.assert_close(prepared[1, 0, 0], BLACK[1])


def test_bad_input():
    pytest.importorskip("PIL")
    with pytest.raises(IsogridError, match=r"'flickr'.*scikit-image, kodak"):
        load_photographs("flickr")
    with pytest.raises(IsogridError, match="limit is 0"):
        load_photographs(limit=0)
