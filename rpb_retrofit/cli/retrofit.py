"""``rpb retrofit SOURCE OUT``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rpb_retrofit.cli.options import (
    AutoBuckets,
    CalibrationTokens,
    Json,
    MaxDistance,
    Seed,
    count,
    unused,
    whole_or_auto,
)
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, say, show
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.tables import CALIBRATED, FROM


def command(
    given: typer.Context,
    source: Annotated[str, typer.Argument(help="A folder, a hub id, or a GGUF file.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", metavar="OUT")],
    buckets: AutoBuckets = 32,
    max_distance: MaxDistance = 128,
    init: Annotated[
        str,
        typer.Option(help="Where the tables' numbers come from: calibrated, zeros, normal, alibi, from:CHECKPOINT."),
    ] = "calibrated",
    calibrate: Annotated[
        str, typer.Option(help="What calibration fits: tables, or tables+content, which changes the query projections.")
    ] = "tables",
    tail: Annotated[
        str,
        typer.Option(help="The bias beyond the maximum distance: flat, or log: falling with its logarithm."),
    ] = "flat",
    scale: Annotated[
        str, typer.Option(help="Of the scores: source, or unscaled: as in T5, folded into what makes the queries.")
    ] = "source",
    keep_frequencies: Annotated[
        Any,
        typer.Option(
            parser=whole_or_auto,
            metavar="K|auto",
            help="RoPE's highest frequencies that go on rotating; auto: those whose wavelength the context holds.",
        ),
    ] = 0,
    polish: Annotated[
        int,
        typer.Option(min=0, metavar="STEPS", help="Steps of training the tables alone to predict as the source does."),
    ] = 0,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to calibrate on. [default: Python's help texts]"),
    ] = None,
    calibration_tokens: CalibrationTokens = "8192",
    calibration_length: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Tokens of a window of it; half come in shorter ones. [default: the context, at most 2048]",
        ),
    ] = None,
    seed: Seed = 0,
    shared: Annotated[bool, typer.Option("--shared", help="One table for all layers.")] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the source's shards: instant, and no space is used.")
    ] = False,
    json: Json = None,
) -> None:
    """Swap the positional mechanism of a checkpoint; write a checkpoint that plain Transformers can load."""
    from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
    from rpb_retrofit.tables.calibrate import SHORTEST

    checkpoint = init.removeprefix(FROM) if init.startswith(FROM) else None
    check_outputs({"--json": json}, [source, calibration, checkpoint], folder=out)
    check_scratch()
    read = count("--calibration-tokens", calibration_tokens)
    length = count("--calibration-length", calibration_length, thousand=1024, least=SHORTEST)
    config = RetrofitConfig(
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        init=init,
        calibrate=calibrate,
        tail=tail,
        scale=scale,
        keep_frequencies=keep_frequencies,
        polish=polish,
        shared=shared,
        seed=seed,
    )
    if buckets == "auto":
        unused(given, ["max_distance"], "--buckets auto also chooses how far they reach")
    text = None
    if init == CALIBRATED or polish or (calibration is not None and config.takes_text):
        from rpb_retrofit.text import CalibrationText

        text = CalibrationText.of(calibration, tokens=read, length=length)
        say(f"calibrating on {text.text.name}")
    elif calibration is not None:
        raise ConfigError(f"--calibration '{calibration}': --init {init} uses no text; leave one of the two out")
    else:
        unused(given, ["calibration_tokens", "calibration_length"], f"--init {init} uses no text")
    done = retrofit_checkpoint(source, out, config, link=link, calibration=text)
    result = {"out": str(done.out), "weights": done.weights, "shards": done.shards, **asdict(done.report)}
    if text is not None:
        result["calibration_text"] = text.text.name
    said = (
        f"{done.report}\n"
        f"weights {done.weights}, {done.shards} shards in {done.out}\n"
        f"load it with rpb_retrofit.load('{done.out}'), or where rpb_retrofit is not installed with\n"
        f"AutoModel...from_pretrained('{done.out}', trust_remote_code=True)"
    )
    show(said, result, json)
