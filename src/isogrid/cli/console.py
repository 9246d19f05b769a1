"""What the verbs print with: results on stdout, notes on stderr."""

from __future__ import annotations

import shlex
import sys

from rich.console import Console
from rich.markup import escape

console = Console()
notes = Console(stderr=True)


def plain(value: object) -> str:
    """Text as itself, no markup."""
    return escape(str(value))


def command_line() -> str:
    """The command line as the user would type it again."""
    return shlex.join(["isogrid", *sys.argv[1:]])
