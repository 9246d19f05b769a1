"""``isogrid inspect``: a model's linear layers."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from isogrid.cli.console import console, plain
from isogrid.cli.options import Json, Model
from isogrid.errors import IsogridError


def inspect(model: Model, as_json: Json = False) -> None:
    """List a model's linear layers: sizes, format, parameters, and what compress would take."""
    from isogrid.cli.source import open_model
    from isogrid.compress import count_parameters, select_layers, stored_bytes, structured_layers
    from isogrid.linear import is_linear
    from isogrid.report import format_bytes, format_count

    loaded, _ = open_model(model)
    structured = structured_layers(loaded)
    try:
        selected = set(select_layers(loaded))
    except IsogridError:
        selected = set()
    rows = []
    for name, module in loaded.named_modules():
        if name in structured:
            layer = structured[name]
            dense = layer.in_features * layer.out_features
            rows.append(
                (name, layer.out_features, layer.in_features, layer.format.label(), layer.cost().parameters, dense)
            )
        elif is_linear(module):
            out_features, in_features = _shape(module)
            label = "dense" if name in selected else "dense (left alone)"
            rows.append(
                (name, out_features, in_features, label, out_features * in_features, out_features * in_features)
            )
    if as_json:
        keys = ("name", "out", "in", "format", "parameters", "dense_parameters")
        console.print_json(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    table = Table(title=f"{type(loaded).__name__}: {model}", title_justify="left")
    for heading in ("layer", "out", "in", "format"):
        table.add_column(heading, justify="right" if heading in ("out", "in") else "left", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("kept", justify="right")
    for name, out_features, in_features, label, parameters, dense in rows:
        table.add_row(
            name,
            str(out_features),
            str(in_features),
            plain(label),
            format_count(parameters),
            f"{parameters / dense:.3f}" if dense else "–",
        )
    console.print(table)
    console.print(
        f"{format_count(count_parameters(loaded))} parameters, {format_bytes(stored_bytes(loaded))}; "
        f"{len(structured)} structured layers, {len(selected)} dense layers that compress would take"
    )


def _shape(module: Any) -> tuple[int, int]:
    from isogrid.linear import linear_matrix

    rows, columns = linear_matrix(module).shape
    return rows, columns
