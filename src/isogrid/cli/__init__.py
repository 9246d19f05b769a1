"""The command ``isogrid``."""

from isogrid.cli.app import main

__all__ = ["main"]
