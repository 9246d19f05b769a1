"""The data of a table as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isogrid.errors import IsogridError
from isogrid.files import replace_file

# JSON has no inf and nan: they are written as strings, and a string that reads like one gets a backslash in front.
NOT_FINITE = re.compile(r"\\*(nan|-?inf)")


def write_json(data: Mapping[str, Any], path: str | Path) -> Path:
    """Write the data of a table as standard JSON, whole or not at all; `read_json` gives back the same dict.

    Args:
        data: dicts, lists, strings, numbers, booleans, None. Infinite and undefined numbers become strings.
        path: the file; missing folders are made.

    Raises:
        IsogridError: something in the data is not plain; the message names its place. The old file stays.
        OSError: the file cannot be written.
    """
    text = _text(_encoded(data, "data"), "")
    return replace_file(path, f"{text}\n".encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        IsogridError: the file is not JSON, or holds no object.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise IsogridError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise IsogridError(f"{path}: holds a {type(data).__name__}; an object is wanted")
    return {key: _decoded(value) for key, value in data.items()}


def _encoded(value: object, place: str) -> object:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise IsogridError(f"{place}: key {key!r} is a {type(key).__name__}; JSON takes strings as keys")
        return {key: _encoded(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):
        return f"\\{value}" if NOT_FINITE.fullmatch(value) else value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool | int):
        return value
    raise IsogridError(
        f"{place} is a {type(value).__name__}; convert it to a number, string, list or dict (tensors: .item())"
    )


def _text(value: object, indent: str) -> str:
    """JSON with what holds no more lists and objects on one line: a layer, a block, a list of numbers."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if not any(isinstance(item, dict | list) and item for item in items):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_text(item, inner)}" for key, item in value.items()]
        opening, closing = "{", "}"
    else:
        lines = [_text(item, inner) for item in items]
        opening, closing = "[", "]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closing}"


def _decoded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, str) and NOT_FINITE.fullmatch(value):
        return value[1:] if value.startswith("\\") else float(value)
    return value
