"""``isogrid advise``: what to do with a model, told before it is done."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import console, notes
from isogrid.cli.options import Data, Json, Model, Quick, Seed
from isogrid.errors import IsogridError


def advise(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the recipes, which compress --recipe follows.")] = Path(
        "advice"
    ),
    target: Annotated[float | None, typer.Option(help="Fraction of the selected parameters to keep.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--bytes", min=1, help="Instead: bytes of the selected matrices together.")
    ] = None,
    gap: Annotated[
        float | None,
        typer.Option(help="Instead: the smallest model whose loss rises by no more than this, in nats a token."),
    ] = None,
    calibrate: Annotated[
        str, typer.Option(help="Calibration: wikitext2:calibration, pydoc, sts:train, photographs, a text file.")
    ] = "pydoc",
    format: Annotated[
        list[str] | None, typer.Option(help="A format that recipes may choose from; several times. Default: auto's.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=2, help="Calibration windows of --length tokens; an encoder takes 8 paragraphs for each.")
    ] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    select: Annotated[list[str] | None, typer.Option(help="Layers to rewrite: q_proj, '*.mlp.*'; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Patterns of layers to leave dense.")] = None,
    data: Data = None,
    seed: Seed = 0,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Three recipes for a size or a quality, from one-shot to distilled, with what is said to come of each."""
    from rich.table import Table

    from isogrid.cli.source import open_model, widest_dtype
    from isogrid.compress import AUTO, Advisor, Recipe, select_layers
    from isogrid.compress.prices import StoredPrices
    from isogrid.formats import Budget
    from isogrid.report import format_bytes, format_duration, write_json
    from isogrid.studies.subjects import calibration_data

    asked = [one for one in (target, max_bytes, gap) if one is not None]
    if len(asked) > 1:
        raise IsogridError("advise takes one of --target, --bytes and --gap")
    if target is not None and not 0 < target < 1:  # before the survey, not after it
        raise IsogridError(f"--target is a share of the parameters in (0, 1), got {target:g}")
    if gap is not None and not gap > 0:
        raise IsogridError(f"--gap is above 0, got {gap:g}")
    loaded, tokenizer = open_model(model)
    windows = min(windows, 8) if quick else windows
    source = {"source": calibrate, "windows": windows, "length": length, "select": select, "skip": skip, "seed": seed}
    unit = None if max_bytes is None else Budget(bytes=0, dtype=widest_dtype(loaded))
    if max_bytes is not None:
        whole = StoredPrices(select_layers(loaded, select, skip or ()), unit).whole()
        if max_bytes >= whole:
            raise IsogridError(f"--bytes {max_bytes}: the selected matrices take {whole}; give less")
    found = calibration_data(calibrate, loaded, tokenizer, windows=windows, length=length, data_dir=data)
    advisor = Advisor(
        loaded,
        found,
        formats=format or AUTO,
        unit=unit,
        tokenizer=tokenizer,
        length=length,
        select=select,
        skip=skip or (),
        seed=seed,
        say=lambda what: notes.print(what, highlight=False, soft_wrap=True),
    )
    if gap is not None:
        recipes = advisor.for_gap(gap)
    elif max_bytes is not None:
        recipes = advisor.for_limit(max_bytes)
    else:
        recipes = advisor.for_keep(0.6 if target is None else target)
    rows: list[dict[str, Any]] = []
    for place, recipe in enumerate(recipes, 1):
        file = out / f"recipe-{place}.json"
        described = Recipe(recipe.effort, recipe.plan, recipe.predicted, source).to_dict() | {"model": model}
        write_json(described, file)
        command = ["isogrid", "compress", model, "--recipe", str(file), "--out", f"compressed-{place}"]
        command += [] if data is None else ["--data", str(data)]
        rows.append({"recipe": recipe.label, **recipe.predicted.to_dict(), "command": shlex.join(command)})
    if as_json:
        console.print_json(json.dumps({"model": model, "rise": advisor.unit_of_gap, "recipes": rows}))
        return
    table = Table(title=f"Recipes for {model}", title_justify="left")
    table.add_column("Recipe", overflow="fold")
    for heading in ("Keep", "Whole model", f"Predicted gap, {advisor.unit_of_gap}", "Time"):
        table.add_column(heading, justify="right")
    for row in rows:
        size = f"{row['keep']:.4f}", format_bytes(row["model_bytes"])
        table.add_row(row["recipe"], *size, f"{row['gap']:.3f}", format_duration(row["seconds"]))
    console.print(table)
    for row in rows:
        console.print(row["command"], highlight=False, soft_wrap=True)
