"""How hyper-parameters are written in descriptions and labels; what reads them is in `spelling`."""

from __future__ import annotations

from typing import Any


def as_json(value: Any) -> Any:
    """A hyper-parameter as JSON has it; formats by their `to_dict`."""
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def spoken(value: Any) -> str:
    """A hyper-parameter as labels say it; formats by their `label`."""
    if isinstance(value, tuple):
        return "[" + ", ".join(spoken(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.label()) if hasattr(value, "label") else str(value)
