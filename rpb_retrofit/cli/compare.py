"""``rpb compare SOURCE``."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.compared import print_answer
from rpb_retrofit.cli.evaluate import parse_kinds, parse_lengths
from rpb_retrofit.cli.options import Bos, CalibrationTokens, Json, Seed, check_bos, count, unused
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, command_line, say, write_json
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line

if TYPE_CHECKING:
    from rpb_retrofit.comparison.healing import Healing
    from rpb_retrofit.text import Text

LONGEST_PROBED = 2048
"""Tokens of the longest prompts that are timed and asked about unless others are wanted: both are slow on a CPU."""


def command(
    given: typer.Context,
    source: Annotated[str, typer.Argument(help="The model to choose for: a folder, a hub id, or a GGUF file.")],
    target_length: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens that it is to read, as 32k. [default: twice its context]")
    ] = None,
    max_slowdown: Annotated[
        float | None, typer.Option(metavar="TIMES", help="At most so many times the source's time.")
    ] = None,
    train_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="At most so many tokens of training, as 5M.")
    ] = None,
    must_keep: Annotated[
        float | None, typer.Option(metavar="NATS", help="At most so much loss inside the context, in nats a token.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Arms, separated by commas: yarn,ntk:4,t5. [default: all the usual ones]"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text, JSONL or Parquet (column 'text'). Default: Python's help.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Context lengths. [default: a quarter of the context, the context, the target]"),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of text, the same at every length. [default: 8192 or more]")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text that T5 arms are fitted to. [default: Python's help texts]")
    ] = None,
    calibration_tokens: CalibrationTokens = "8192",
    calibration_length: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of a window of it. [default: the context, at most 2048]")
    ] = None,
    heal: Annotated[
        str | None, typer.Option(metavar="N", help="Also train every arm on so many tokens, as 1M, and measure again.")
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text to train on: a file or a hub id.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="How to train, as of rpb finetune. [default: the next token]")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Learning rates; each is tried on a quarter of the tokens, for every arm.")
    ] = "1e-4,3e-4,1e-3",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 1,
    retrieval: Annotated[
        str, typer.Option(metavar="KINDS", help="Kinds of questions, as of rpb evaluate.")
    ] = "passkey",
    items: Annotated[int, typer.Option(min=0, help="Questions of each kind, length and depth; 0 for none.")] = 2,
    asked: Annotated[
        str | None, typer.Option(metavar="LENGTHS", help="Lengths to ask at. [default: those up to 2048]")
    ] = None,
    timed: Annotated[
        str | None, typer.Option(metavar="LENGTHS", help="Prompts to time. [default: lengths up to 2048]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing; 0 for none.")] = 3,
    bos: Bos = "auto",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where report.html and report.json go.")] = Path(
        "comparison"
    ),
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write it as Markdown, with its pictures beside it.")
    ] = None,
    json: Json = None,
) -> None:
    """Which positional mechanism to take for a target length, measured on your model under your constraints."""
    from rpb_retrofit.checkpoint.load import open_causal_lm
    from rpb_retrofit.comparison.arms import ARMS, parse
    from rpb_retrofit.comparison.candidates import Constraints
    from rpb_retrofit.comparison.card import write_card
    from rpb_retrofit.comparison.measures import ComparisonPlan
    from rpb_retrofit.comparison.page import write_page
    from rpb_retrofit.comparison.result import result
    from rpb_retrofit.comparison.run import MEASURED, Compare
    from rpb_retrofit.evaluation.nll import check_ids
    from rpb_retrofit.files.folder import check_absent, whole_folder
    from rpb_retrofit.files.journal import Journal
    from rpb_retrofit.runtime.anatomy import Anatomy
    from rpb_retrofit.runtime.families import family_of
    from rpb_retrofit.tables.calibrate import SHORTEST
    from rpb_retrofit.text import CalibrationText, bos_policy, tokenise
    from rpb_retrofit.training.identity import checksum, fingerprint, texts_of

    start = time.perf_counter()
    constraints = Constraints(max_slowdown, count("--train-tokens", train_tokens, least=0), must_keep)
    budget, tried = count("--heal", heal), _rates(rates)
    check_bos(bos)
    if budget is not None and constraints.train_tokens is not None and budget > constraints.train_tokens:
        raise ConfigError(
            f"--heal {heal} and --train-tokens {train_tokens} contradict each other: no arm that is trained could be "
            "taken; lower the one or raise the other"
        )
    names = arms.split(",") if arms else [name for name, arm in ARMS.items() if arm.usual]
    for name in names:
        parse(name)
    if max_slowdown is not None and not rounds:
        raise ConfigError(f"--max-slowdown {max_slowdown} and --rounds 0 contradict each other: nothing would be timed")
    kinds = parse_kinds(retrieval)
    wanted_target = count("--target-length", target_length, thousand=1024, least=2)
    read = count("--calibration-tokens", calibration_tokens)
    window = count("--calibration-length", calibration_length, thousand=1024, least=SHORTEST)
    if budget is None:
        unused(given, ["train_data", "recipe", "rates", "seeds"], "they say how to train, which --heal asks for")
    if not (kinds and items):
        unused(given, ["asked", "retrieval"] if kinds else ["asked"], "nothing is asked")
    if not rounds:
        unused(given, ["timed"], "--rounds 0 times nothing")
    check_absent(out)
    files = [source, data, calibration, train_data, recipe]
    check_outputs({"--card": card, "--json": json}, files, {"--card": (".md",)}, out)
    check_scratch()
    scored, fitted = _texts(data, calibration, train_data)
    model, tokenizer = open_causal_lm(source)
    context = Anatomy.of(model).context
    target = wanted_target or 2 * (context or 0)
    if target < 2:
        raise ConfigError(f"'{source}' does not say for how many tokens it was trained: give --target-length")
    wanted = sorted({*(parse_lengths(lengths) if lengths else _lengths(context, target)), target})
    if must_keep is not None and context is not None and min(wanted) > context:
        raise ConfigError(
            f"--must-keep {must_keep} and --lengths {lengths} contradict each other: none lies within the context of "
            f"{context}; add one that does"
        )
    plan = ComparisonPlan(
        target,
        tuple(wanted),
        count("--tokens", tokens) or max(8192, target),
        _some(asked, wanted, "--asked"),
        tuple(kinds),
        items,
        _some(timed, wanted, "--timed"),
        rounds,
        seed,
    )
    documents = tokenise(tokenizer, scored.documents)
    check_ids(model, documents)
    longest = max(map(len, documents))
    if min(longest, plan.tokens) < target:
        raise ConfigError(
            f"--target-length {target}: the longest document of {scored.name} has {longest} tokens, and {plan.tokens} "
            "tokens are read: give longer text, more --tokens or a shorter target"
        )
    healing = None
    if budget is not None:
        healing = _healing(budget, train_data, recipe, tried, seeds, seed, tokenizer, min(context or 512, 512), model)
    windows = CalibrationText(fitted, read, window).windows(tokenizer, context)
    identity = {
        "source": source,
        "weights": fingerprint(source),
        "plan": asdict(plan),
        "text": scored.checksum,
        "calibration": [fitted.checksum, read, window],
        "healing": None if healing is None else [healing.recipe.model_dump(mode="json"), list(healing.rates)],
        "training texts": {n: checksum(Path(n)) for n in texts_of(healing.recipe)} if healing is not None else {},
        "bos": bos,
    }
    with Journal.open(out.with_name(f"{out.name}.run"), identity, "rpb compare", MEASURED, say) as journal:
        comparison = Compare(model, names, plan, windows, journal, say).run(
            documents, bos_policy(tokenizer, bos), tokenizer, healing
        )
        about = {
            "command": command_line(),
            "source": source,
            "mechanism": family_of(model.config).mechanism,
            "text": scored.name,
            "plan": {**asdict(plan), "calibration": fitted.name, "heal": budget or 0, "seeds": seeds if budget else 1},
            "seconds": time.perf_counter() - start,
        }
        found = result(comparison, constraints, about)
        print_answer(found)
        with whole_folder(out) as folder:
            write_page(found, folder / "report.html")
            write_json(folder / "report.json", found)
        journal.remove()
    print(f"\nreport: {one_line(out / 'report.html')}")
    if card is not None:
        write_card(found, card, f"Positional mechanisms for {source}, to read {target:,} tokens")
    if json is not None:
        write_json(json, found)


def _texts(data: str | None, calibration: str | None, train_data: str | None) -> tuple[Text, Text]:
    """What is scored, and what arms are fitted to: never the same. ConfigError where they are one file."""
    from rpb_retrofit.text import Text, read_text

    for option, file in (("--calibration", calibration), ("--train-data", train_data)):
        if file is not None and data is not None and Path(file).absolute() == Path(data).absolute():
            raise ConfigError(
                f"{option} '{file}' is the --data too: arms that are fitted to the text they are scored on look better "
                "than they are; give another file"
            )
    scored, fitted = read_text(data), read_text(calibration, "--calibration")
    if data is None and calibration is None:
        (whole,) = scored.documents
        half = len(whole) // 2
        scored = Text(f"the first half of {scored.name}", [whole[:half]])
        fitted = Text(f"the second half of {fitted.name}", [whole[half:]])
    return scored, fitted


def _lengths(context: int | None, target: int) -> list[int]:
    """A short length, the context, and the target."""
    return [n for n in ((context or target) // 4, context or target) if 2 <= n < target]


def _some(asked: str | None, lengths: list[int], option: str) -> tuple[int, ...]:
    """The lengths that a user named, or those that are not too slow."""
    if asked is not None:
        return tuple(parse_lengths(asked, option))
    return tuple(n for n in lengths if n <= LONGEST_PROBED) or (min(LONGEST_PROBED, lengths[0]),)


def _healing(
    budget: int,
    train_data: str | None,
    recipe: Path | None,
    rates: list[float],
    seeds: int,
    seed: int,
    tokenizer: Any,
    length: int,
    model: Any,
) -> Healing:
    """The budget of training: the recipe's stages, scaled to so many tokens."""
    from rpb_retrofit.comparison.healing import Healing
    from rpb_retrofit.training.recipe import read_recipe

    if train_data is None:
        raise ConfigError("--heal needs text to train on, other text than is scored: give --train-data FILE")
    settings: dict[str, Any] = {"data": [{"name": train_data}]}
    if recipe is None:
        stage = {"train": "all", "tokens": budget, "lengths": {length: 1.0}}
        settings |= {"objective": "next-token", "stages": [stage], "seed": seed}
    read = read_recipe(recipe, settings)
    stages = [
        stage.model_copy(update={"tokens": max(1, round(stage.tokens * budget / read.tokens))}) for stage in read.stages
    ]
    read = read.model_copy(update={"stages": stages})
    return Healing(read, rates, seeds, tokenizer, model if read.objective == "distillation" else None)


def _rates(rates: str) -> list[float]:
    """Learning rates. ConfigError names what is none."""
    found = []
    for item in rates.split(","):
        try:
            rate = float(item)
        except ValueError as error:
            raise ConfigError(f"--rates {rates}: give numbers, separated by commas") from error
        if not 0 < rate < math.inf:
            raise ConfigError(f"--rates {rates}: '{item}' is no learning rate: give finite numbers above 0")
        found.append(rate)
    return found
