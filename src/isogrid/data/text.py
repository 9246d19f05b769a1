"""Texts by name, and the windows of tokens that language models are calibrated and measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isogrid.data.hub import wikitext2_half
from isogrid.data.lookup import DatasetNotFoundError, find_dataset
from isogrid.errors import IsogridError

TEXTS: dict[str, str] = {
    "wikitext2:evaluation": "the first half of the raw WikiText-2 test articles, for perplexity",
    "wikitext2:calibration": "the other half, for calibration and refinement",
    "pydoc": "Python's language reference as its standard library holds it: needs no download",
    "shakespeare": "1.1 MB of plays, for small models from scratch",
}


def load_text(source: str | Path, data_dir: Path | str | None = None) -> str:
    """A text by name, or any UTF-8 text file by path.

    Args:
        source: a key of ``TEXTS``, or the path of a file.
        data_dir: where data sets are looked up; see `data_folders`.

    Raises:
        IsogridError: the source is neither a name nor a file, the file isn't UTF-8, or the data set can't be found.
    """
    name = str(source)
    if name.startswith("wikitext2:") and name in TEXTS:
        return _wikitext2(name.partition(":")[2], data_dir)
    if name == "pydoc":
        return _pydoc()
    if name == "shakespeare":
        return _read(find_dataset("tiny_shakespeare", data_dir) / "input.txt")
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path)
    raise IsogridError(
        f"text {name!r} is neither a name nor a file; names are {', '.join(TEXTS)}, "
        "anything else is the path of a UTF-8 text file"
    )


def token_windows(tokenizer: Callable[..., Any], text: str, length: int = 512, limit: int | None = None) -> Tensor:
    """Non-overlapping windows over a text that is tokenised whole.

    No special tokens are added; what is left after the last full window is dropped.

    Args:
        tokenizer: a transformers tokenizer, or anything that is called alike and returns ``{"input_ids": [...]}``.
        text: the text.
        length: tokens in a window.
        limit: the most windows to return, counted from the start; None returns all.

    Returns:
        int64, ``(windows, length)``.

    Raises:
        IsogridError: the text holds less than one window, or a length or limit is below one.
    """
    for label, value in (("length", length), ("limit", limit)):
        if value is not None and value < 1:
            raise IsogridError(f"token_windows: {label} is {value}; it has to be at least 1")
    # verbose=False: transformers would warn that the text is longer than the model's context; it is cut below.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // length
    if windows == 0:
        raise IsogridError(
            f"token_windows: the text has {len(ids)} tokens, less than one window of {length}; "
            "give a longer text or a shorter length"
        )
    if limit is not None:
        windows = min(windows, limit)
    return torch.tensor(ids[: windows * length], dtype=torch.int64).view(windows, length)


def _wikitext2(half: str, data_dir: Path | str | None) -> str:
    try:
        return _read(find_dataset("wikitext2", data_dir) / f"{half}.txt")
    except DatasetNotFoundError as missing:
        try:
            return wikitext2_half(half)
        except IsogridError as error:
            raise DatasetNotFoundError(f"{missing}. Then {error}") from error


def _pydoc() -> str:
    from pydoc_data.topics import topics

    # Sorted, so that the text is the same whatever order the dictionary was written in.
    return "\n\n".join(topics[topic].strip() for topic in sorted(topics)) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IsogridError(f"{path} is not UTF-8 text: {error}; convert it first") from error
    except OSError as error:
        raise IsogridError(f"{path} can't be read: {error}") from error
