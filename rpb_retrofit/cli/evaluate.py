"""``rpb evaluate MODEL``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rpb_retrofit.cli.options import Bos, Json, check_bos, count, unused
from rpb_retrofit.cli.outputs import PICTURES, check_outputs, check_scratch, show, table
from rpb_retrofit.config import parse_count
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line

if TYPE_CHECKING:
    from rpb_retrofit.evaluation.retrieval import Cell
    from rpb_retrofit.evaluation.speed import Skipped, SpeedResult


def command(
    given: typer.Context,
    model: Annotated[str, typer.Argument(help="A retrofit, any causal model's folder or hub id, or a GGUF file.")],
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text, JSONL or Parquet (column 'text'). Default: Python's help.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "512,2048",
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of text, the same ones at every length.")] = "8192",
    stride: Annotated[
        str,
        typer.Option(
            metavar="N", help="Tokens from one window to the next; 0: the length, so that windows do not overlap."
        ),
    ] = "0",
    bos: Bos = "auto",
    retrieval: Annotated[
        str, typer.Option(metavar="KINDS", help="Ask about long contexts: kinds separated by commas, or all.")
    ] = "",
    depths: Annotated[str, typer.Option(help="Where in the context the answer stands, 0 to 1.")] = "0,0.5,1",
    items: Annotated[int, typer.Option(min=1, help="Questions of each kind, length and depth.")] = 10,
    rounds: Annotated[
        int, typer.Option("--speed", metavar="ROUNDS", min=0, help="Time it so often at each length.")
    ] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the loss by position.")] = None,
    json: Json = None,
) -> None:
    """Mean loss by context length and by position, what the model finds in a long context, and how fast it is."""
    from rpb_retrofit.checkpoint.load import open_causal_lm
    from rpb_retrofit.evaluation.nll import Windows, check_ids, nll_at_length
    from rpb_retrofit.evaluation.retrieval import cells, make_items, measure
    from rpb_retrofit.evaluation.speed import speed
    from rpb_retrofit.text import bos_policy, read_text, tokenise

    wanted, kinds, places = parse_lengths(lengths), parse_kinds(retrieval), parse_depths(depths)
    check_bos(bos)
    budget, every = count("--tokens", tokens, least=2), count("--stride", stride, thousand=1024, least=0)
    if every > min(wanted):
        raise ConfigError(f"--stride {stride}: it must lie between 1 and the shortest length, {min(wanted)}")
    if not kinds:
        unused(given, ["depths", "items"], "they belong to --retrieval, and nothing is asked")
    check_outputs({"--plot": plot, "--json": json}, [model, data], {"--plot": PICTURES})
    check_scratch()
    text = read_text(data)
    network, tokenizer = open_causal_lm(model)
    documents, first = tokenise(tokenizer, text.documents), bos_policy(tokenizer, bos)
    check_ids(network, documents)
    asked = [item for kind in kinds for item in make_items(kind, tokenizer, documents, wanted, places, items)]
    results = [
        nll_at_length(network, documents, Windows(length, every or length - (first is not None), first), budget)
        for length in wanted
    ]
    answers = measure(network, asked)
    if plot:
        from rpb_retrofit.evaluation.plots import loss_by_position, save

        save(loss_by_position({Path(model).name: results}), plot)
    policy = "no BOS" if first is None else f"BOS ({tokenizer.bos_token!r}) first in every window"
    cut = f"stride {every}" if every else "windows do not overlap"
    lines = [
        one_line(model),
        f"text: {one_line(text.name)}; {cut}; {policy}; loss in nats a token, each token counting the same",
        "",
    ]
    rows = [[str(r.length), f"{r.nll:.4f}", str(r.tokens), str(r.windows)] for r in results]
    lines += [table(["length", "loss", "tokens", "windows"], rows), "", "by position in the window:"]
    edges = [f"{b.first}-{b.last}" for b in max(results, key=lambda r: r.length).by_position]
    by_edge = [{f"{b.first}-{b.last}": f"{b.nll:.3f}" for b in r.by_position} for r in results]
    lines.append(
        table(["position", *(str(r.length) for r in results)], [[e, *(b.get(e, "") for b in by_edge)] for e in edges])
    )
    found = cells(answers)
    if kinds:
        prompts = "plain prompts" if tokenizer.chat_template is None else "chat prompts"
        lines += ["", f"retrieval, {items} {prompts} each; correct: share answered to the letter; loss of the answer:"]
        lines.append(cell_table(found))
    timed = speed({"model": network}, wanted, rounds=rounds)["model"] if rounds else []
    if timed:
        lines += ["", f"medians of {rounds} rounds; memory is what a run holds beside the weights:", speed_table(timed)]
    settings = {"model": model, "data": text.name, "stride": every or "length", "bos": policy, "tokens": budget}
    measured = {"lengths": [asdict(r) for r in results], "retrieval": [asdict(c) for c in found], "answers": answers}
    measured["speed"] = [asdict(result) for result in timed]
    show("\n".join(lines), {**settings, **measured}, json)


def cell_table(cells: Sequence[Cell]) -> str:
    """What was found of each kind, at each length and depth."""
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
    found = set()
    for item in lengths.split(","):
        length = parse_count(item, thousand=1024)
        if length is None or length < 2:
            raise ConfigError(f"{option} {lengths}: '{item}' is not a length of at least 2 tokens")
        found.add(length)
    return sorted(found)


def parse_kinds(kinds: str) -> list[str]:
    """``passkey,key-value`` as names in that order, ``all`` as all of them. ConfigError for an unknown one."""
    from rpb_retrofit.evaluation.retrieval import check_kind
    from rpb_retrofit.evaluation.tasks import KINDS

    if kinds.strip() == "all":
        return list(KINDS)
    found = [kind.strip() for kind in kinds.split(",")] if kinds else []
    for kind in found:
        check_kind(kind)
    return list(dict.fromkeys(found))


def parse_depths(depths: str) -> list[float]:
    """``0,0.5,1`` as numbers, ascending. ConfigError names what is no depth."""
    found = []
    for item in depths.split(","):
        try:
            depth = float(item)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise ConfigError(f"--depths {depths}: '{item}' is not a depth between 0, the context's beginning, and 1")
        found.append(depth)
    return sorted(set(found))
