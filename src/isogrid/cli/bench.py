"""``isogrid bench``: how fast layers are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isogrid.cli.console import command_line, console, notes, plain
from isogrid.cli.options import Quick, Seed
from isogrid.errors import IsogridError


def bench(
    suite: Annotated[str, typer.Option(help="layers: structured layers against nn.Linear and peers.")] = "layers",
    out: Annotated[Path | None, typer.Option(help="Default: results/bench/SUITE.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Timed calls of each kind at each point.")] = 15,
    full: Annotated[bool, typer.Option(help="More formats, shapes and rows: hours.")] = False,
    seed: Seed = 0,
    quick: Quick = False,
) -> None:
    """Time structured layers, as a share of what their operation counts promise."""
    from isogrid.studies.layer_speed import run_layer_speed

    if suite != "layers":
        raise IsogridError(f"--suite is layers, got {suite!r}")
    target = out or Path("results/bench") / suite
    run_layer_speed(
        target,
        suite=suite,
        full=full,
        quick=quick,
        threads=threads,
        repeats=repeats,
        seed=seed,
        command=command_line(),
        say=lambda line: notes.print(plain(line), highlight=False, soft_wrap=True),
    )
    table = (target / "table.md").read_text().split("\n\n")
    console.print("\n\n".join(table[:3]), highlight=False, markup=False)
    console.print(f"written to {target}", highlight=False, soft_wrap=True)
