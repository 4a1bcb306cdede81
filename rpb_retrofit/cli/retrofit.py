"""``rpb retrofit SOURCE OUT``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.options import (
    AutoBuckets,
    CalibrationTokens,
    Json,
    MaxDistance,
    NewFolder,
    Seed,
    count,
    frequencies,
    unused,
)
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, say, show
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.tables import CALIBRATED, FROM

if TYPE_CHECKING:
    from rpb_retrofit.checkpoint.convert import Conversion
    from rpb_retrofit.evaluation.keeping import Keeping
    from rpb_retrofit.text.calibration_text import CalibrationText

Source = Annotated[str, typer.Argument(help="A folder, a hub id, or a GGUF file.", metavar="SOURCE")]
Init = Annotated[
    str,
    typer.Option(help="Where the tables' numbers come from: calibrated, zeros, normal, alibi, from:CHECKPOINT."),
]
Calibrate = Annotated[
    str, typer.Option(help="What calibration fits: tables, or tables+content, which changes the query projections.")
]
Tail = Annotated[
    str, typer.Option(help="The bias beyond the maximum distance: flat, or log: falling with its logarithm.")
]
Scale = Annotated[
    str, typer.Option(help="Of the scores: source, or unscaled: as in T5, folded into what makes the queries.")
]
KeepFrequencies = Annotated[
    Any,
    typer.Option(
        parser=frequencies,
        metavar="K|auto|all[+N][,LAYERS:K...]",
        help="RoPE's highest frequencies that go on rotating; auto: those that turn within the context. By layer: "
        "20,17-18:28,sliding_attention:all; +N: all in the N layers that far copies need most.",
    ),
]
Polish = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Steps of training the tables alone to predict as the source does.")
]
Calibration = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text to calibrate on. [default: Python's help texts]")
]
CalibrationLength = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Tokens of a window of it; half come in shorter ones. [default: the context, at most 2048]",
    ),
]
CalibrationRepeats = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Share of its tokens, at most 0.5, planted as spans that come again, near and far.",
    ),
]
Measured = Annotated[
    bool,
    typer.Option(help="Measure source and retrofit on text: loss by length, and what spans that come again gain."),
]
Shared = Annotated[bool, typer.Option("--shared", help="One table for all layers.")]
Link = Annotated[bool, typer.Option("--link", help="Hard-link the source's shards: instant, and no space is used.")]


def command(
    context: typer.Context,
    source: Source,
    out: NewFolder,
    buckets: AutoBuckets = 32,
    max_distance: MaxDistance = 128,
    init: Init = "calibrated",
    calibrate: Calibrate = "tables",
    tail: Tail = "flat",
    scale: Scale = "source",
    keep_frequencies: KeepFrequencies = 0,
    polish: Polish = 0,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = "8192",
    calibration_length: CalibrationLength = None,
    calibration_repeats: CalibrationRepeats = 0.0,
    seed: Seed = 0,
    shared: Shared = False,
    measure: Measured = True,
    link: Link = False,
    json: Json = None,
) -> None:
    """Swap the positional mechanism of a checkpoint; write a checkpoint that plain Transformers can load."""
    from rpb_retrofit.checkpoint.convert import retrofit_checkpoint

    tables_from = init.removeprefix(FROM) if init.startswith(FROM) else None
    check_outputs({"--json": json}, [source, calibration, tables_from], folder=out)
    check_scratch()
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
        unused(context, ["max_distance"], "--buckets auto also chooses how far they reach")
    text = _calibration_text(context, config, calibration, calibration_tokens, calibration_length, calibration_repeats)
    if text is None:
        unused(context, ["measure"], f"--init {init} loads no weights")
    if text is None or not measure:
        done, kept = retrofit_checkpoint(source, out, config, link=link, calibration=text), None
    else:
        from rpb_retrofit.evaluation.keeping import retrofit_measured

        done, kept = retrofit_measured(source, out, config, text, link=link)
    result = {"out": str(done.out), "weights": done.weights, "shards": done.shards, **asdict(done.report)}
    if text is not None:
        result |= {"calibration_text": text.text.name, "calibration_repeats": text.repeats}
    if kept is not None:
        result["measured"] = kept if isinstance(kept, str) else asdict(kept)
    show(_in_words(done, kept), result, json)


def _calibration_text(
    context: typer.Context,
    config: RetrofitConfig,
    file: str | None,
    tokens: str,
    length: str | None,
    repeats: float,
) -> CalibrationText | None:
    """The text that a config asks for; None where it asks for none. ConfigError where options of it go unused."""
    from rpb_retrofit.tables.calibrate import SHORTEST

    read = count("--calibration-tokens", tokens)
    window = count("--calibration-length", length, thousand=1024, least=SHORTEST)
    if config.init == CALIBRATED or config.polish or (file is not None and config.takes_text):
        from rpb_retrofit.text.calibration_text import CalibrationText

        text = CalibrationText.of(file, tokens=read, length=window, repeats=repeats)
        if not config.takes_text:
            unused(context, ["calibration_repeats"], f"--init {config.init} is only polished, on the text as it is")
        say(f"calibrating on {text.text.name}" + (f", repeats in {repeats:.0%} of its tokens" if repeats else ""))
        return text
    if file is not None:
        raise ConfigError(f"--calibration '{file}': --init {config.init} uses no text; leave one of the two out")
    options = ["calibration_tokens", "calibration_length", "calibration_repeats"]
    unused(context, options, f"--init {config.init} uses no text")
    return None


def _in_words(done: Conversion, kept: Keeping | str | None) -> str:
    return (
        f"{done.report}\n"
        + ("" if kept is None else f"{kept}\n")
        + f"weights {done.weights}, {done.shards} shards in {done.out}\n"
        f"load it with rpb_retrofit.load('{done.out}'), or where rpb_retrofit is not installed with\n"
        f"AutoModel...from_pretrained('{done.out}', trust_remote_code=True)"
    )
