"""``isogrid bench``: how fast layers and models are on this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Quick, Seed
from isogrid.errors import IsogridError


def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="layers: structured layers against nn.Linear and peers; models: two embedded models, end to end."
        ),
    ] = "layers",
    out: Annotated[Path | None, typer.Option(help="Default: results/bench/SUITE.")] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads: 1, or 1,2 to see how they scale.")] = "1",
    repeats: Annotated[int, typer.Option(min=3, help="Timed rounds of each point.")] = 31,
    full: Annotated[bool, typer.Option(help="layers: more formats, shapes and rows: hours.")] = False,
    seed: Seed = 0,
    quick: Quick = False,
) -> None:
    """Time structured layers, as a share of what their operation counts promise, or whole models. Goes on where it
    was interrupted; what it measures is kept for `StructuredLinear.plan`, as `isogrid tune` does.
    """
    from isogrid.studies.layer_speed import run_layer_speed
    from isogrid.studies.model_speed import run_model_speed

    try:
        counts = [int(count) for count in threads.split(",")]
    except ValueError:
        raise IsogridError(f"--threads is a number or several with commas between, got {threads!r}") from None
    runs: dict[str, Callable[..., Any]] = {"layers": partial(run_layer_speed, full=full), "models": run_model_speed}
    if suite not in runs:
        raise IsogridError(f"--suite is one of {', '.join(runs)}, got {suite!r}")
    if full and suite != "layers":
        raise IsogridError("--full is for --suite layers")
    target = out or Path("results/bench") / suite
    runs[suite](
        target,
        quick=quick,
        threads=counts,
        repeats=repeats,
        seed=seed,
        command=command_line(),
        say=lambda line: notes.print(plain(line), highlight=False, soft_wrap=True),
    )
    table = (target / "table.md").read_text().partition("\n## Points")[0]
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {target}", highlight=False, soft_wrap=True)
