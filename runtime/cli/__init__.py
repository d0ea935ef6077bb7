"""The command line: `scheinfer COMMAND`. Each command's code, and what it imports, is loaded when it runs."""

from runtime.cli.entry import main

__all__ = ["main"]
