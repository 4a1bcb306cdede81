"""``rpb explain``: one offset in words, or the whole map of buckets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.options import Buckets, Json, MaxDistance
from rpb_retrofit.cli.outputs import PICTURES, check_outputs, show, writable
from rpb_retrofit.errors import ConfigError

if TYPE_CHECKING:
    from rpb_retrofit.runtime.buckets import Bucketing, OffsetRange


def command(
    query: Annotated[int | None, typer.Option(help="Position of the query.")] = None,
    key: Annotated[int | None, typer.Option(help="Position of the key.")] = None,
    buckets: Buckets = 32,
    max_distance: MaxDistance = 128,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Map of an encoder's table.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the map as a picture.")] = None,
    json: Json = None,
) -> None:
    """Say which bucket an offset is in; without --query and --key, print and draw the whole map."""
    from rpb_retrofit.runtime.buckets import Bucketing

    check_outputs({"--plot": plot, "--json": json}, endings={"--plot": PICTURES})
    if plot and query is not None:
        raise ConfigError("--plot draws the whole map: leave --query and --key out")
    if (query is None) != (key is None):
        raise ConfigError(f"--{'key' if key is None else 'query'} is missing: give both, or none for the whole map")
    if query is not None and bidirectional:
        raise ConfigError("--bidirectional: an offset is looked up in both kinds of table anyway: leave it out")
    if query is not None and key is not None:
        text, result = explain_pair(query, key, buckets, max_distance)
    else:
        bucketing = Bucketing(buckets, max_distance, bidirectional).validate()
        text, result = explain_map(bucketing)
        if plot:
            from rpb_retrofit.evaluation.plots import bucket_map, save

            save(bucket_map(bucketing), plot)
    show(text, result, json)


def explain_pair(query: int, key: int, buckets: int, max_distance: int) -> tuple[str, dict[str, Any]]:
    """The offset of two positions, and its bucket in a causal and in a bidirectional table."""
    import torch

    from rpb_retrofit.runtime.buckets import Bucketing, bucket_of, offsets_of

    for name, position in (("query", query), ("key", key)):
        if not 0 <= position < 2**62:
            raise ConfigError(f"--{name} {position}: positions count from 0, and fit 62 bits")
    offset = query - key
    side = f"{offset} before" if offset > 0 else f"{-offset} after"
    where = "the key is the query itself" if offset == 0 else f"the key lies {side} the query"
    lines = [f"query {query}, key {key}: offset {offset}: {where}."]
    result: dict[str, Any] = {"query": query, "key": key, "offset": offset}
    for bidirectional in (False, True):
        bucketing = Bucketing(buckets, max_distance, bidirectional).validate()
        bucket = int(bucket_of(torch.tensor(offset), bucketing))
        kind = "bidirectional" if bidirectional else "causal"
        result[kind] = {"bucket": bucket, "visible": bidirectional or offset >= 0}
        held = offsets_of(bucket, bucketing)
        if result[kind]["visible"] and held:
            lines.append(f"{kind} table: bucket {bucket} of {buckets}, which holds {describe(held)}.")
        else:
            lines.append(f"{kind} table: hidden, as a key after the query is (bucket {bucket}, never looked up).")
    return "\n".join(lines), result


def explain_map(bucketing: Bucketing) -> tuple[str, dict[str, Any]]:
    """Every bucket with its offsets, and a bar as long as the logarithm of how many it holds."""
    from rpb_retrofit.runtime.buckets import offsets_of

    kind = "bidirectional" if bucketing.bidirectional else "causal"
    exact, lines, rows = bucketing.num_exact, [], []
    block, line, end = "█─▶" if writable("█─▶") else "#->"
    lines.append(f"{kind} table, {bucketing.num_buckets} buckets, maximum distance {bucketing.max_distance}")
    for bucket in range(bucketing.num_buckets):
        held = offsets_of(bucket, bucketing)
        index = bucket % bucketing.per_direction
        part = "one to one" if index < exact else "logarithmic"
        if held is None:
            lines.append(f"{bucket:4}  holds no offset")
            rows.append({"bucket": bucket, "first": None, "last": None, "part": "empty"})
            continue
        if held.first is None or held.last is None:
            part, bar = "constant tail", line * 24 + end
        else:
            bar = block * (1 + round(4 * math.log2(held.last - held.first + 1)))
        lines.append(f"{bucket:4}  {describe(held):<24}{part:<15}{bar}")
        rows.append({"bucket": bucket, "first": held.first, "last": held.last, "part": part})
    return "\n".join(lines), {"kind": kind, "max_distance": bucketing.max_distance, "buckets": rows}


def describe(held: OffsetRange) -> str:
    """Offsets in words: ``offset 3``, ``offsets 16 to 18``, ``offsets from 113``."""
    if held.first is None:
        return f"offsets to {held.last}"
    if held.last is None:
        return f"offsets from {held.first}"
    return f"offset {held.first}" if held.first == held.last else f"offsets {held.first} to {held.last}"
