"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a hub name, or smollm2-135m, minilm, vit-s-saliency.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]
Quick = Annotated[bool, typer.Option(help="Less data, for a first look.")]
Data = Annotated[Path | None, typer.Option("--data", help="Where data sets are looked up first.")]
