"""Skips that name what is absent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from isogrid.data import PRETRAINED, DatasetNotFoundError, find_dataset


def dataset(name: str) -> Path:
    try:
        return find_dataset(name)
    except DatasetNotFoundError:
        pytest.skip(f"data set {name} is absent")


def package(distribution: str) -> None:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"package {distribution} is absent")


def pretrained(name: str) -> None:
    package(PRETRAINED[name].package)
    reader = {"smollm2-135m": "gguf", "vit-s-saliency": "onnx"}.get(name)
    if reader and importlib.util.find_spec(reader) is None:
        pytest.skip(f"package {reader} is absent")
