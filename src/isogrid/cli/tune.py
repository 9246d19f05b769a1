"""``isogrid tune``: which product is the faster for each layer here."""

from __future__ import annotations

import json

from isogrid.cli.console import console, notes
from isogrid.cli.options import Json, Model, Quick


def tune(model: Model, quick: Quick = False, as_json: Json = False) -> None:
    """Time a compressed model's layers against dense products; layers then choose by these times."""
    from isogrid.cli.source import open_model
    from isogrid.evaluation import tune as tune_model
    from isogrid.linear import speed_table

    loaded, _ = open_model(model)
    rows = tune_model(
        loaded,
        repeats=3 if quick else 9,
        say=lambda line: notes.print(line, highlight=False, soft_wrap=True),
    )
    if as_json:
        console.print_json(json.dumps(rows))
        return
    dense = sum(row["plan"] == "dense" for row in rows)
    console.print(
        f"{len(rows)} points, {dense} of them faster dense; kept in {speed_table().place}",
        highlight=False,
        soft_wrap=True,
    )
