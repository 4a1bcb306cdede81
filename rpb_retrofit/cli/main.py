"""The commands, and how a mistake is answered: one line, exit status 2."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from rpb_retrofit.cli import card, compare, demo, diagnose, evaluate, explain, finetune, retrofit
from rpb_retrofit.errors import InterruptedRunError, RetrofitError
from rpb_retrofit.files.temporary import REMEDY
from rpb_retrofit.version import __version__

# Typer carries its own copy of click and exports of its errors only this one: BadParameter, a UsageError.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
for module in (retrofit, finetune, evaluate, diagnose, compare, card, explain, demo):
    app.command(module.__name__.rpartition(".")[2])(module.command)


@app.callback(invoke_without_command=True)
def about(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Swap the positional mechanism of a pretrained model for T5's relative position bias, and see what it cost."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run ``rpb``. Exit status 0: done; 1: a regression found (``diagnose --fail-on-regression``); 2: a mistake of
    the user's, named in one line; 130: interrupted; 143: stopped by SIGTERM after saving."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except InterruptedRunError as error:
        _say(str(error))
        sys.exit(143)
    except RetrofitError as error:
        _say(str(error))
        sys.exit(2)
    except FileNotFoundError as error:  # PyTorch looks for a folder for temporary files when it is imported
        if "temporary directory" not in str(error):
            raise
        _say(f"no temporary files can be written: {REMEDY}")
        sys.exit(2)
    except UsageError as error:
        _say(error.format_message())
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _say(message: str) -> None:
    """One line, from the first process of a launcher's: what a user did wrong is wrong on all of them."""
    if os.environ.get("RANK", "0") == "0":
        print(f"rpb: {message}", file=sys.stderr)
