"""``rpb card MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rpb_retrofit.cli.options import Json
from rpb_retrofit.cli.outputs import check_outputs, show
from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.whole_file import write_whole


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

    folder = _folder(model)
    target = folder / CARD
    check_outputs({"--json": json}, [folder, *(evaluation or [])], folder=target)
    card = make_card(folder, evaluation or [])
    if (target.exists() or target.is_symlink()) and not force:
        raise CheckpointError(f"'{target}' exists already: give --force to replace it")
    write_whole(target, str(card))
    show(f"written to {target}", {"card": str(target), "metadata": card.data.to_dict()}, json)


def _folder(model: Path) -> Path:
    """The folder that a user named. CheckpointError for ``~nobody``."""
    try:
        return model.expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"'{model}': {error}") from error
