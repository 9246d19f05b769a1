"""Progress on a terminal, for work that takes longer than two seconds; silent anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PATIENCE = 2.0


class Step(Protocol):
    """Called after each piece of work with its name."""

    def __call__(self, name: str = "") -> None:
        """One piece more is done."""


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Step]:
    """A bar over ``total`` pieces of work (None: unknown) on standard error, shown once two seconds have passed."""
    if not sys.stderr.isatty():
        yield lambda name="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[piece]}"),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(description, total=total, piece="")
    begun = time.monotonic()
    shown = False

    def step(name: str = "") -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > PATIENCE:
            bar.start()
            shown = True
        bar.update(task, advance=1, piece=name)

    try:
        yield step
    finally:
        if shown:
            bar.stop()
