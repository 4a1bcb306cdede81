"""The commands."""

from __future__ import annotations

import typer

from rpb_retrofit.cli import card, compare, demo, diagnose, evaluate, explain, finetune, retrofit
from rpb_retrofit.cli.repeated import Command
from rpb_retrofit.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for module in (retrofit, finetune, evaluate, diagnose, compare, card, explain, demo):
    app.command(module.__name__.rpartition(".")[2], cls=Command)(module.command)


@app.callback(invoke_without_command=True)
def about(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Swap the positional mechanism of a pretrained model for T5's relative position bias, and see what it cost."""
    if version:
        print(__version__)
        raise typer.Exit
