"""The command line: parse, call, print."""

from rpb_retrofit.cli.main import main

__all__ = ["main"]
