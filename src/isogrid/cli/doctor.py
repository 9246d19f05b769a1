"""``isogrid doctor``: what this installation has."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from isogrid.cli.console import console
from isogrid.cli.options import Json
from isogrid.errors import IsogridError


def doctor(as_json: Json = False) -> None:
    """Say what this installation has: versions, threads, products, embedded models, data sets."""
    import importlib.metadata

    from isogrid import __version__
    from isogrid.data import DATASETS, PRETRAINED, find_dataset
    from isogrid.kernels.native.build import compiler, unsuitable
    from isogrid.linear import speed_table
    from isogrid.report import describe_machine

    found: dict[str, Any] = describe_machine(__version__)
    for package in ("transformers", "safetensors", "accelerate", "matplotlib", "jinja2", "gguf", "datasets"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    tool = compiler()
    built = f"built by {tool}" if tool else "none: no C++ compiler; name one in CXX"
    found["native products"] = unsuitable() or built
    times = speed_table().place
    found["measured times"] = str(times) if times.is_file() else "none: isogrid tune MODEL"
    for name, source in PRETRAINED.items():
        try:
            found[f"model {name}"] = f"{source.package} {importlib.metadata.version(source.package)}"
        except importlib.metadata.PackageNotFoundError:
            found[f"model {name}"] = f"not installed: {source.install}"
    for name in DATASETS:
        try:
            found[f"data {name}"] = str(find_dataset(name))
        except IsogridError:
            found[f"data {name}"] = "not found"
    if as_json:
        console.print_json(json.dumps(found))
        return
    table = Table(show_header=False, title="isogrid doctor", title_justify="left")
    for key, value in found.items():
        table.add_row(key, str(value))
    console.print(table)
