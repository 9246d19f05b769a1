"""What safetensors files say they hold, read and checked before any tensor is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from isogrid.checkpoint.layers import MARK, LayerEntry
from isogrid.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies and what shape it has."""

    file: Path
    shape: tuple[int, ...]


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder.

    Raises:
        CheckpointError: no folder, no config, or not JSON.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that save wrote")
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: it is no checkpoint, or its writing was interrupted")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index or the one file.

    Raises:
        CheckpointError: none, an index that points outside the folder, or a missing shard.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {WEIGHTS}: its writing was interrupted, or it holds no weights")
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({error})") from None
    check_inside(files, folder)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks the shard {file.name} that its index names")
    return files


def check_inside(files: Iterable[Path], folder: Path) -> None:
    """Raise CheckpointError for a file that lies outside the folder: an index must not name other people's files.

    A link inside the folder is followed wherever it leads (model caches are made of links); ``..`` is not.
    """
    for file in files:
        if ".." in file.parts or (file.parent.resolve() != folder.resolve()):
            raise CheckpointError(f"the index names {file}, which is outside of {folder}; refused")


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Names and shapes of all tensors, from the headers alone.

    Raises:
        CheckpointError: a truncated or corrupt file; names it.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    headers[name] = TensorHeader(file, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or corrupt ({error}); write or download it again") from None
    return headers


def check_headers(
    layers: Mapping[str, LayerEntry], headers: Mapping[str, TensorHeader], source: str, *, complete: bool = True
) -> None:
    """Raise CheckpointError unless the files hold every factor of every layer in its shape, and no dense weight.

    ``complete=False`` passes over layers that the files don't name: transformers stores some architectures (ViT) under
    older names, and the loader looks for missing factors when it has read everything.
    """
    held = {key.rpartition(".")[0] for key in headers}
    for name, entry in layers.items():
        if not complete and name not in held:
            continue
        for tensor, shape in entry.tensors().items():
            key = f"{name}.{tensor}"
            if key not in headers:
                raise CheckpointError(f"{source}: layer {name!r} lacks its {tensor!r}; the checkpoint is incomplete")
            if headers[key].shape != shape:
                raise CheckpointError(
                    f"{source}: {key} has shape {headers[key].shape}, config.json asks for {shape}; "
                    "the two files don't belong together"
                )
        mark = headers.get(f"{name}.{MARK}")
        if mark is not None and mark.shape != (0,):
            raise CheckpointError(f"{source}: layer {name!r} has a dense weight beside its factors; files are mixed up")
