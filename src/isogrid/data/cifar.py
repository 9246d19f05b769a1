"""CIFAR-10, as uint8 pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import torch
from torch import Tensor

from isogrid.data.lookup import find_dataset
from isogrid.errors import IsogridError


def load_cifar10(
    split: str = "train", *, limit: int | None = None, data_dir: Path | str | None = None
) -> tuple[Tensor, Tensor]:
    """Pictures and classes of CIFAR-10 (Krizhevsky 2009): 50,000 to train on, 10,000 to test on.

    Args:
        split: ``"train"`` or ``"test"``.
        limit: the most pictures, from the start; the order is shuffled already.
        data_dir: where data sets are looked up; see `data_folders`.

    Returns:
        uint8 ``(pictures, 3, 32, 32)`` and int64 ``(pictures,)``.

    Raises:
        IsogridError: another split, a data set that can't be found, or a missing package.
    """
    if split not in ("train", "test"):
        raise IsogridError(f"CIFAR-10: split {split!r} is unknown; there are train and test")
    try:
        from PIL import Image
    except ImportError as error:
        raise IsogridError("CIFAR-10's pictures take the package Pillow: pip install pillow") from error
    path = find_dataset("cifar10", data_dir) / f"{split}.npz"
    with numpy.load(path, allow_pickle=False) as stored:
        files, offsets, labels = stored["jpeg"], stored["offsets"], stored["labels"]
    count = len(labels) if limit is None else min(limit, len(labels))
    pictures = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    for i in range(count):
        with Image.open(io.BytesIO(files[offsets[i] : offsets[i + 1]].tobytes())) as picture:
            pictures[i] = torch.from_numpy(numpy.array(picture.convert("RGB"))).permute(2, 0, 1)
    return pictures, torch.from_numpy(labels[:count].astype(numpy.int64))
