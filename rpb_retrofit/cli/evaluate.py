"""``rpb evaluate MODEL``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.options import Bos, Json, count, unused
from rpb_retrofit.cli.outputs import PICTURES, check_outputs, check_scratch, show, table
from rpb_retrofit.config import parse_count
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line

if TYPE_CHECKING:
    from rpb_retrofit.evaluation.evaluate import EvaluationResult
    from rpb_retrofit.evaluation.nll import LengthResult
    from rpb_retrofit.evaluation.retrieval import Cell
    from rpb_retrofit.evaluation.speed import Skipped, SpeedResult


Model = Annotated[str, typer.Argument(help="A retrofit, any causal model's folder or hub id, or a GGUF file.")]
Data = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text, JSONL or Parquet (column 'text'). Default: Python's help.")
]
Lengths = Annotated[str, typer.Option(help="Context lengths, separated by commas.")]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens of text, the same ones at every length.")]
Stride = Annotated[
    str,
    typer.Option(
        metavar="N", help="Tokens from one window to the next; 0: the length, so that windows do not overlap."
    ),
]
Retrieval = Annotated[
    str, typer.Option(metavar="KINDS", help="Ask about long contexts: kinds separated by commas, or all.")
]
Depths = Annotated[str, typer.Option(help="Where in the context the answer stands, 0 to 1.")]
Items = Annotated[int, typer.Option(min=1, help="Questions of each kind, length and depth.")]
Rounds = Annotated[int, typer.Option("--speed", metavar="ROUNDS", min=0, help="Time it so often at each length.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the loss by position.")]


def command(
    given: typer.Context,
    model: Model,
    data: Data = None,
    lengths: Lengths = "512,2048",
    tokens: Tokens = "8192",
    stride: Stride = "0",
    bos: Bos = "auto",
    retrieval: Retrieval = "",
    depths: Depths = "0,0.5,1",
    items: Items = 10,
    rounds: Rounds = 0,
    plot: Plot = None,
    json: Json = None,
) -> None:
    """Mean loss by context length and by position, what the model finds in a long context, and how fast it is."""
    from rpb_retrofit.evaluation.evaluate import evaluate

    kinds = parse_kinds(retrieval)
    settings: dict[str, Any] = {
        "lengths": parse_lengths(lengths),
        "depths": parse_depths(depths),
        "tokens": count("--tokens", tokens, least=0),
        "stride": count("--stride", stride, thousand=1024, least=0),
    }
    if not kinds:
        unused(given, ["depths", "items"], "they belong to --retrieval, and nothing is asked")
    check_outputs({"--plot": plot, "--json": json}, [model, data], {"--plot": PICTURES})
    check_scratch()
    result = evaluate(model, data=data, bos=bos, retrieval=kinds, items=items, rounds=rounds, **settings)
    if plot:
        from rpb_retrofit.evaluation.plots import loss_by_position, save

        save(loss_by_position({Path(model).name: result.lengths}), plot)
    show(in_words(result, items, rounds), result.as_json(), json)


def in_words(result: EvaluationResult, items: int, rounds: int) -> str:
    """All tables, for the terminal."""
    cut = f"stride {result.stride}" if result.stride else "windows do not overlap"
    text = f"text: {one_line(result.data)}; {cut}; {result.bos}; loss in nats a token, each token counting the same"
    rows = [[str(r.length), f"{r.nll:.4f}", str(r.tokens), str(r.windows)] for r in result.lengths]
    lines = [one_line(result.model), text, "", table(["length", "loss", "tokens", "windows"], rows)]
    lines += ["", "by position in the window:", position_table(result.lengths)]
    if result.answers:
        prompts = "chat prompts" if result.chat else "plain prompts"
        lines += ["", f"retrieval, {items} {prompts} each; correct: share answered to the letter; loss of the answer:"]
        lines.append(cell_table(result.retrieval))
    if result.speed:
        lines += ["", f"medians of {rounds} rounds; memory is what a run holds beside the weights:"]
        lines.append(speed_table(result.speed))
    return "\n".join(lines)


def position_table(results: Sequence[LengthResult]) -> str:
    """Loss by position in the window, a column for each length."""
    edges = [f"{b.first}-{b.last}" for b in max(results, key=lambda r: r.length).by_position]
    by_edge = [{f"{b.first}-{b.last}": f"{b.nll:.3f}" for b in r.by_position} for r in results]
    rows = [[edge, *(losses.get(edge, "") for losses in by_edge)] for edge in edges]
    return table(["position", *(str(r.length) for r in results)], rows)


def cell_table(cells: Sequence[Cell]) -> str:
    """Answers of each kind, at each length and depth."""
    rows = [
        [c.kind, str(c.length), "all" if c.depth is None else f"{c.depth:g}", f"{c.correct:.0%}", f"{c.nll:.4f}"]
        for c in cells
    ]
    return table(["kind", "length", "depth", "correct", "loss"], rows)


def speed_table(results: Sequence[SpeedResult | Skipped]) -> str:
    """How fast a model is at each length, or why it was not measured there."""
    from rpb_retrofit.evaluation.speed import SpeedResult

    rows = []
    for r in results:
        if isinstance(r, SpeedResult):
            memory = "not measured" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f} MB"
            times = [f"{r.prefill_tokens_per_s:.0f}", f"{r.first_token_s.median:.3f}", f"{r.decode_tokens_per_s:.1f}"]
            rows.append([str(r.length), *times, memory])
        else:
            rows.append([str(r.length), "skipped:", r.reason, "", ""])
    return table(["length", "prefill tokens/s", "first token s", "decoding tokens/s", "memory"], rows)


def parse_lengths(lengths: str, option: str = "--lengths") -> list[int]:
    """``512,2k`` as numbers, ascending. ConfigError names what is no length."""
    parsed = set()
    for item in lengths.split(","):
        length = parse_count(item, thousand=1024)
        if length is None or length < 2:
            raise ConfigError(f"{option} {lengths}: '{item}' is not a length of at least 2 tokens")
        parsed.add(length)
    return sorted(parsed)


def parse_kinds(kinds: str) -> list[str]:
    """``passkey,key-value`` as names in that order, ``all`` as all of them. ConfigError for an unknown one."""
    from rpb_retrofit.evaluation.retrieval import check_kind
    from rpb_retrofit.evaluation.tasks import KINDS

    if kinds.strip() == "all":
        return list(KINDS)
    names = [kind.strip() for kind in kinds.split(",")] if kinds else []
    for name in names:
        check_kind(name)
    return list(dict.fromkeys(names))


def parse_depths(depths: str) -> list[float]:
    """``0,0.5,1`` as numbers, ascending. ConfigError names what is no depth."""
    parsed = []
    for item in depths.split(","):
        try:
            depth = float(item)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise ConfigError(f"--depths {depths}: '{item}' is not a depth between 0, the context's beginning, and 1")
        parsed.append(depth)
    return sorted(set(parsed))
