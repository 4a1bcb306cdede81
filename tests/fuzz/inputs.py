"""Hostile inputs: files of a checkpoint with something in them that should not be there, settings, recipes, texts."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import yaml
from hypothesis import strategies as st

NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 31, 64, 2**31, 2**63, 2**70, -(2**63), 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")]
)
"""None that would only make a model large: what takes long because it is much is no fault."""

ODD = ["", "auto", "rope", "none", "../x", "~nosuchuser/x", "a\x1b[31m\nrpb: fine", "\u202e", "x" * 5000, "\0"]
TEXTS = st.sampled_from(ODD) | st.text(max_size=8)

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=4,
)
"""What JSON can hold where something else is expected."""


def paths(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a document something stands."""
    items: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        items = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    return [drawn for key, value in items for drawn in ((*path, key), *paths(value, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A document with one to three things in it replaced, taken away or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not (known := paths(document)):
            break
        *path, last = draw(st.sampled_from(known))
        place = document
        for key in path:
            place = place[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "replace":
            place[last] = draw(VALUES)
        elif how == "remove":
            del place[last]
        elif isinstance(place, dict):
            place[draw(TEXTS)] = draw(VALUES)
    return document


@st.composite
def spliced(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some were cut out, doubled or replaced."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 64)))
    return data[:start] + draw(st.binary(max_size=16)) + data[end:]


def json_file(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON file gone wrong."""
    whole = json.dumps(document, indent=2).encode()
    return st.one_of(changed(document).map(lambda drawn: json.dumps(drawn).encode()), spliced(whole), deep())


def deep() -> st.SearchStrategy[bytes]:
    """JSON nested deeper than a parser goes."""
    return st.sampled_from([b'{"a":' * 100_000, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b""])


@st.composite
def safetensors_file(draw: st.DrawFn, data: bytes) -> bytes:
    """A shard whose header lies."""
    (size,) = struct.unpack("<Q", data[:8])
    if draw(st.booleans()):
        return draw(spliced(data[: size + 64])) + data[size + 64 :]
    header = json.dumps(draw(changed(json.loads(data[8 : 8 + size])))).encode()
    claimed = draw(st.sampled_from([len(header), len(header), len(header), 0, 2**40, 2**63, len(header) - 1]))
    return struct.pack("<Q", claimed) + header + data[8 + size :] + draw(st.sampled_from([b"", b"", b"trailing"]))


def recipe_file(document: Any) -> st.SearchStrategy[bytes]:
    """A recipe gone wrong."""
    whole = yaml.safe_dump(document).encode()
    odd = [
        b"seed: 1\nseed: 2\n",
        b"a: &a [*a]\n",
        b"[" * 5000,
        b"seed: " + b"9" * 5000,
        b"\xff\xfe",
        b"!!python/name:os",
    ]
    dumped = changed(document).map(lambda drawn: yaml.safe_dump(drawn, allow_unicode=True).encode(errors="replace"))
    return st.one_of(dumped, spliced(whole), st.sampled_from(odd))


def text_file(prose: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """An ending, and what a file with it holds."""
    rows = st.lists(
        st.dictionaries(st.sampled_from(["text", "a\x1b[31m"]), VALUES | st.just(prose), max_size=2), max_size=3
    )
    lines = rows.map(lambda drawn: "\n".join(map(json.dumps, drawn)).encode())
    return st.one_of(
        st.tuples(st.sampled_from([".txt", ".md"]), st.binary(max_size=64) | spliced(prose.encode())),
        st.tuples(st.sampled_from([".jsonl", ".json"]), lines | st.binary(max_size=64) | deep()),
        st.tuples(st.just(".parquet"), st.binary(max_size=64) | st.just(b"PAR1" + b"\0" * 64 + b"PAR1")),
        st.tuples(st.sampled_from(["", ".bin", ".csv"]), st.just(b"x")),
    )


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "--buckets": NUMBERS | TEXTS,
    "--max-distance": NUMBERS | TEXTS,
    "--init": TEXTS | st.sampled_from(["zeros", "normal", "alibi", "from:nowhere", "from:", "calibrated"]),
    "--tail": st.sampled_from(["flat", "log", "cubic"]) | TEXTS,
    "--scale": st.sampled_from(["source", "unscaled"]) | TEXTS,
    "--keep-frequencies": NUMBERS | TEXTS,
    "--seed": NUMBERS,
    "--calibration-length": st.sampled_from(["1k", "nan", "-3", "0", "32"]),
}


def settings() -> st.SearchStrategy[list[str]]:
    """Options of `rpb retrofit`."""
    one = st.sampled_from(sorted(OPTIONS)).flatmap(lambda name: OPTIONS[name].map(lambda value: f"{name}={value}"))
    return st.lists(one, min_size=1, max_size=3).map(lambda drawn: [option.replace("\0", "") for option in drawn])
