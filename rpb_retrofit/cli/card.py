"""``rpb card MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rpb_retrofit.cli.options import Json, check_writable, show
from rpb_retrofit.errors import CheckpointError


def command(
    model: Annotated[Path, typer.Argument(help="A retrofit's folder.", metavar="MODEL")],
    evaluation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What rpb evaluate --json wrote; may be given again.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that is there.")] = False,
    json: Json = None,
) -> None:
    """Write the model card of a retrofit, from its config, its training and its evaluations, into its README.md."""
    from rpb_retrofit.cards.card import CARD, make_card

    check_writable("--json", json)
    target = model.expanduser() / CARD
    card = make_card(model.expanduser(), evaluation or [])
    if target.exists() and not force:
        raise CheckpointError(f"'{target}' exists already: give --force to replace it")
    card.save(target)
    show(f"written to {target}", {"card": str(target), "metadata": card.data.to_dict()}, json)
