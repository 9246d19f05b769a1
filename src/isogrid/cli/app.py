"""The command line; each verb is a thin layer over the library."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from isogrid.cli.advise import advise
from isogrid.cli.bench import bench
from isogrid.cli.compare import compare
from isogrid.cli.compress import compress
from isogrid.cli.console import console, notes, plain
from isogrid.cli.demo import demo
from isogrid.cli.doctor import doctor
from isogrid.cli.evaluate import evaluate
from isogrid.cli.formats import formats
from isogrid.cli.inspect import inspect
from isogrid.cli.memory import memory
from isogrid.cli.prune import prune
from isogrid.cli.report import report
from isogrid.cli.study import study
from isogrid.cli.tune import tune
from isogrid.errors import IsogridError, IsogridWarning

app = typer.Typer(
    name="isogrid",
    help="Structured matrices for efficient deep learning: compress, evaluate and inspect models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

VERBS = (advise, compress, prune, evaluate, compare, inspect, formats, demo, report, memory, bench, tune, study, doctor)
for verb in VERBS:
    app.command()(verb)


def main() -> None:
    """Run the command; bad input ends with one line and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except IsogridError as error:
        notes.print(f"[bold red]error:[/] {plain(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, a full disk: the system's words are clear
        notes.print(f"[bold red]error:[/] {plain(error)}", soft_wrap=True, highlight=False)
        sys.exit(2)


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, IsogridWarning):
        notes.print(f"[bold yellow]warning:[/] {plain(message)}", soft_wrap=True, highlight=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from isogrid import __version__

        console.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Structured matrices for efficient deep learning: compress, evaluate and inspect models."""
