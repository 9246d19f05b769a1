"""``python -m isogrid``: the command line, also for launchers that take a module."""

from isogrid.cli.app import main

main()
