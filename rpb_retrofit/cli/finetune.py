"""``rpb finetune RETROFIT OUT``; scripts/finetune.py under ``accelerate launch`` is the same program."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.options import Json, NewFolder
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, say, show
from rpb_retrofit.errors import ConfigError

if TYPE_CHECKING:
    from rpb_retrofit.training.recipe import Recipe

Retrofit = Annotated[str, typer.Argument(help="A retrofit: a folder or a hub id.", metavar="RETROFIT")]
RecipeFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The recipe, as YAML. [default: 50k tokens of distillation]")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe: --set stages.1.tokens=1000000."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="Text to train on: a file or a hub id. [default: Python's help texts]"),
]
Source = Annotated[
    str | None, typer.Option(help="The source, where the retrofit's config no longer names where it is.")
]
Control = Annotated[bool, typer.Option("--control", help="Train the source instead, by the same recipe: the control.")]
Arms = Annotated[
    str | None, typer.Option(help="retrofit,control: both, one after the other, into OUT and OUT-control.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what is left of an earlier run.")]
ShowRecipe = Annotated[bool, typer.Option("--show-recipe", help="Print the resolved recipe and end.")]


def command(
    retrofit: Retrofit,
    out: NewFolder,
    recipe: RecipeFile = None,
    changes: Changes = None,
    data: Data = None,
    source: Source = None,
    control: Control = False,
    arms: Arms = None,
    restart: Restart = False,
    show_recipe: ShowRecipe = False,
    json: Json = None,
) -> None:
    """Heal a retrofit by fine-tuning, on one process or, under accelerate launch, on many. Goes on where it stopped."""
    if control and arms:
        raise ConfigError(f"--control and --arms {arms}: give one of the two")
    resolved = _resolved(recipe, changes or [], data or [])
    read = [retrofit, source, recipe, resolved.held_out, *(text.name for text in resolved.data)]
    if not show_recipe:
        from rpb_retrofit.diagnosis.open_models import known_source

        read.append(known_source(retrofit))
    check_outputs({"--json": json}, read, folder=out)
    if show_recipe:
        show(resolved.to_yaml().rstrip(), resolved.model_dump(mode="json"), json)
        return
    check_scratch()
    from accelerate import PartialState

    from rpb_retrofit.training.run import finetune_arms

    wanted = [arm.strip() for arm in arms.split(",")] if arms else ["control" if control else "retrofit"]
    done = finetune_arms(retrofit, out, resolved, wanted, source=source, restart=restart, say=say)
    if PartialState().is_main_process:
        result = {arm: asdict(summary) for arm, summary in done.items()}
        show("\n\n".join(f"{summary}" for summary in done.values()) + f"\nwritten to {out}", result, json)
    PartialState().destroy_process_group()


def _resolved(file: Path | None, changes: list[str], data: list[str]) -> Recipe:
    """The recipe in a file, with what ``--set`` and ``--data`` change of it. ConfigError where they contradict."""
    from rpb_retrofit.training.recipe import read_recipe

    settings = _changes(changes)
    if data:
        if key := next((key for key in settings if key.split(".")[0] == "data"), None):
            raise ConfigError(f"--data {data[0]} and --set {key}=... both say what to train on: give one of the two")
        settings["data"] = [{"name": name} for name in data]
    return read_recipe(file, settings)


def _changes(texts: list[str]) -> dict[str, Any]:
    """What ``--set`` says. ConfigError where one of them undoes another."""
    changes: dict[str, Any] = {}
    for text in texts:
        key, value = _change(text)
        if before := next((other for other in changes if f"{other}.".startswith(f"{key}.")), None):
            raise ConfigError(f"--set {text}: an earlier --set {before}=... would be lost; give one of the two")
        changes[key] = value
    return changes


def _change(text: str) -> tuple[str, Any]:
    from rpb_retrofit.training.yaml_text import read_yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: give KEY=VALUE")
    return key, read_yaml(value, f"--set {text}")
