"""``rpb finetune RETROFIT OUT``; scripts/finetune.py under ``accelerate launch`` is the same program."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from rpb_retrofit.cli.options import Json, check_writable, show
from rpb_retrofit.errors import ConfigError


def command(
    retrofit: Annotated[str, typer.Argument(help="A retrofit: a folder or a hub id.", metavar="RETROFIT")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", metavar="OUT")],
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The recipe, as YAML. [default: 50k tokens of distillation]")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe: --set stages.1.tokens=1000000."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Text to train on: a file or a hub id. [default: Python's help texts]"),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="The source, where the retrofit's config no longer names where it is.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Train the source instead, by the same recipe: the control.")
    ] = False,
    arms: Annotated[
        str | None, typer.Option(help="retrofit,control: both, one after the other, into OUT and OUT-control.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what is left of an earlier run.")] = False,
    show_recipe: Annotated[bool, typer.Option("--show-recipe", help="Print the resolved recipe and end.")] = False,
    json: Json = None,
) -> None:
    """Heal a retrofit by fine-tuning, on one process or, under accelerate launch, on many. Goes on where it stopped."""
    from rpb_retrofit.training.recipe import read_recipe

    check_writable("--json", json)
    if control and arms:
        raise ConfigError(f"--control and --arms {arms}: give one of the two")
    settings = dict(map(_change, changes or []))
    if data:
        settings["data"] = [{"name": name} for name in data]
    resolved = read_recipe(recipe, settings)
    if show_recipe:
        show(resolved.to_yaml().rstrip(), resolved.model_dump(mode="json"), json)
        return
    from accelerate import PartialState

    from rpb_retrofit.training.run import finetune_arms

    wanted = [arm.strip() for arm in arms.split(",")] if arms else ["control" if control else "retrofit"]
    done = finetune_arms(
        retrofit, out, resolved, wanted, source=source, restart=restart, say=lambda text: print(text, file=sys.stderr)
    )
    if PartialState().is_main_process:
        result = {arm: asdict(summary) for arm, summary in done.items()}
        show("\n\n".join(f"{summary}" for summary in done.values()) + f"\nwritten to {out}", result, json)
    PartialState().destroy_process_group()


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: give KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML") from error
