"""``rpb compare SOURCE``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rpb_retrofit.cli.compared import print_answer
from rpb_retrofit.cli.evaluate import Data, parse_kinds, parse_lengths
from rpb_retrofit.cli.options import Bos, CalibrationTokens, Json, Seed, count, unused
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, command_line, say, write_json
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line

Source = Annotated[str, typer.Argument(help="The model to choose for: a folder, a hub id, or a GGUF file.")]
TargetLength = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens that it is to read, as 32k. [default: twice its context]")
]
MaxSlowdown = Annotated[float | None, typer.Option(metavar="TIMES", help="At most so many times the source's time.")]
TrainTokens = Annotated[str | None, typer.Option(metavar="N", help="At most so many tokens of training, as 5M.")]
MustKeep = Annotated[
    float | None, typer.Option(metavar="NATS", help="At most so much loss inside the context, in nats a token.")
]
Arms = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Arms, separated by commas: yarn,ntk:4,t5. [default: all the usual ones]"),
]
Lengths = Annotated[
    str | None, typer.Option(help="Context lengths. [default: a quarter of the context, the context, the target]")
]
Tokens = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens of text, the same at every length. [default: 8192 or more]")
]
Calibration = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text that T5 arms are fitted to. [default: Python's help texts]")
]
CalibrationLength = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens of a window of it. [default: the context, at most 2048]")
]
Heal = Annotated[
    str | None, typer.Option(metavar="N", help="Also train every arm on so many tokens, as 1M, and measure again.")
]
TrainData = Annotated[str | None, typer.Option(metavar="FILE", help="Text to train on: a file or a hub id.")]
RecipeFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="How to train, as of rpb finetune. [default: the next token]")
]
Rates = Annotated[str, typer.Option(help="Learning rates; each is tried on a quarter of the tokens, for every arm.")]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings of each arm.")]
Retrieval = Annotated[str, typer.Option(metavar="KINDS", help="Kinds of questions, as of rpb evaluate.")]
Items = Annotated[int, typer.Option(min=0, help="Questions of each kind, length and depth; 0 for none.")]
Asked = Annotated[str | None, typer.Option(metavar="LENGTHS", help="Lengths to ask at. [default: those up to 2048]")]
Timed = Annotated[str | None, typer.Option(metavar="LENGTHS", help="Prompts to time. [default: lengths up to 2048]")]
Rounds = Annotated[int, typer.Option(min=0, help="Rounds of timing; 0 for none.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where report.html and report.json go.")]
Card = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write it as Markdown, with its pictures beside it.")
]


def command(
    given: typer.Context,
    source: Source,
    target_length: TargetLength = None,
    max_slowdown: MaxSlowdown = None,
    train_tokens: TrainTokens = None,
    must_keep: MustKeep = None,
    arms: Arms = None,
    data: Data = None,
    lengths: Lengths = None,
    tokens: Tokens = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = "8192",
    calibration_length: CalibrationLength = None,
    heal: Heal = None,
    train_data: TrainData = None,
    recipe: RecipeFile = None,
    rates: Rates = "1e-4,3e-4,1e-3",
    seeds: Seeds = 1,
    retrieval: Retrieval = "passkey",
    items: Items = 2,
    asked: Asked = None,
    timed: Timed = None,
    rounds: Rounds = 3,
    bos: Bos = "auto",
    seed: Seed = 0,
    out: Out = Path("comparison"),
    card: Card = None,
    json: Json = None,
) -> None:
    """Which positional mechanism to take for a target length, measured on your model under your constraints."""
    settings = parsed({name: value for name, value in locals().items() if name not in NOT_SETTINGS})
    check_idle(given, settings)
    check_outputs(
        {"--card": card, "--json": json}, [source, data, calibration, train_data, recipe], {"--card": (".md",)}, out
    )
    check_scratch()
    from rpb_retrofit.comparison.compare import compare

    result = compare(source, **settings, out=out, say=say, command=command_line())
    print_answer(result.document)
    print(f"\nreport: {one_line(out / 'report.html')}")
    if card is not None:
        result.write_card(card)
    if json is not None:
        write_json(json, result.document)


NOT_SETTINGS = ("given", "source", "out", "card", "json")
"""Options that are not arguments of `rpb_retrofit.compare` of the same name and meaning."""


def parsed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the arguments of `rpb_retrofit.compare`. ConfigError for what is no number, length or kind."""
    lengths = {
        name: None if options[name] is None else parse_lengths(options[name], f"--{name}")
        for name in ("lengths", "asked", "timed")
    }
    thousands = dict.fromkeys(("target_length", "calibration_length"), 1024)
    counts = {
        name: count(f"--{name.replace('_', '-')}", options[name], thousands.get(name, 1000), least=0)
        for name in (*thousands, "train_tokens", "heal", "tokens", "calibration_tokens")
    }
    listed = {
        "arms": options["arms"].split(",") if options["arms"] else None,
        "retrieval": parse_kinds(options["retrieval"]),
        "rates": parse_rates(options["rates"]),
    }
    return {**options, **lengths, **counts, **listed}


def check_idle(given: typer.Context, settings: Mapping[str, Any]) -> None:
    """ConfigError for an option that another one leaves without effect."""
    kinds, items = settings["retrieval"], settings["items"]
    if settings["heal"] is None:
        unused(given, ["train_data", "recipe", "rates", "seeds"], "they say how to train, which --heal asks for")
    if not (kinds and items):
        unused(given, ["asked", "retrieval"] if kinds else ["asked"], "nothing is asked")
    if not settings["rounds"]:
        unused(given, ["timed"], "--rounds 0 times nothing")


def parse_rates(rates: str) -> list[float]:
    """Learning rates. ConfigError names what is none."""
    parsed = []
    for item in rates.split(","):
        try:
            rate = float(item)
        except ValueError as error:
            raise ConfigError(f"--rates {rates}: give numbers, separated by commas") from error
        if not 0 < rate < math.inf:
            raise ConfigError(f"--rates {rates}: '{item}' is no learning rate: give finite numbers above 0")
        parsed.append(rate)
    return parsed
