"""A comparison as `rpb compare` writes it, made up: what it measures on a small model that reads twice its context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from rpb_retrofit.comparison.candidates import Constraints
from rpb_retrofit.comparison.figures import table
from rpb_retrofit.comparison.recommend import recommend

JSON = dict[str, Any]

CONTEXT, TARGET = 8192, 16384

ARMS: Mapping[str, tuple[float, float, float]] = {
    "source": (2.41, 4.873, 1.0),
    "linear:2": (2.662, 2.871, 1.003),
    "dynamic": (2.41, 2.594, 1.021),
    "ntk:2": (2.437, 2.571, 0.997),
    "yarn:2": (2.421, 2.534, 1.008),
    "longrope": (2.424, 2.541, 1.011),
    "alibi": (4.93, 5.02, 1.094),
    "none": (8.21, 9.344, 0.913),
    "t5-zeros": (7.11, 7.95, 1.09),
    "t5": (3.27, 3.93, 1.102),
    "t5-kept": (2.48, 3.402, 1.114),
    "t5-kept-log": (2.481, 3.17, 1.187),
}
"""By arm: the loss inside the context, at the target, and the time over the source's."""


def gap(mean: float, spread: float = 0.012, real: bool | None = None) -> JSON:
    """A difference as in the result; an infinite ``spread`` is what one cluster of text knows."""
    return {
        "mean": mean,
        "low": mean - spread,
        "high": mean + spread,
        "p": 0.001 if (abs(mean) > spread if real is None else real) else 0.6,
        "detectable": 1.4 * spread,
        "items": 16000,
        "clusters": 120 if math.isfinite(spread) else 1,
        "real": abs(mean) > spread if real is None else real,
    }


def healed(arm: str) -> tuple[float, float]:
    """What an arm's losses would be after training."""
    inside, target, _ = ARMS[arm]
    return 2.36 + 0.06 * (inside - 2.36), 2.44 + 0.1 * (target - 2.44)


def row(name: str, tokens: int = 0, spread: float = 0.012) -> JSON:
    """One row, against the source or the trained source."""
    inside, target, slow = ARMS[name]
    base, far, _ = ARMS["source"]
    if tokens:
        (inside, target), (base, far) = healed(name), healed("source")
    reference = name == "source"

    def above(loss: float, below: float) -> JSON | None:
        return None if reference else gap(loss - below, spread)

    first = [2**n for n in range(14)]
    bins = [(f, 2 * f - 1, inside + 5.5 / f**0.45) for f in first]
    bins[-1] = (CONTEXT, TARGET - 1, target)
    measured = [(2048, inside + 0.05, base + 0.05), (CONTEXT, inside, base), (TARGET, 0.6 * inside + 0.4 * target, far)]
    return {
        "id": f"{name} healed" if tokens else name,
        "arm": name,
        "about": f"what {name} is",
        "how": f'config.json: "rope_parameters": {{"rope_type": "{name}", "factor": 2.0}}',
        "tokens": tokens,
        "rate": 3e-4 if tokens else None,
        "seeds": 2 if tokens else 1,
        "losses": [{"length": n, "mean": mean, "above": above(mean, below)} for n, mean, below in measured],
        "inside": {"length": CONTEXT, "mean": inside, "above": above(inside, base)},
        "beyond": {"length": TARGET, "first": CONTEXT, "mean": target, "above": above(target, far)},
        "by_position": [
            {"length": TARGET, "first": f, "last": last, "nll": mean, "low": mean - 0.1, "high": mean + 0.1}
            for f, last, mean in bins
        ],
        "retrieval": [
            {"kind": kind, "length": n, "depth": depth, "items": 4, "correct": right if inside < 3 else 0.0, "nll": 1.0}
            for kind, depths in (("passkey", (0.1, 0.5, 0.9)), ("multi-value", (None,)))
            for n in (512, 2048)
            for depth, right in zip(depths, (0.25, 0.5, 1.0), strict=False)
        ],
        "induction": [{"distance": d, **gap(9 - inside - d / 2048, 0.4)} for d in (495, 2031)],
        "speed": [timed(512, slow - 0.01, name), timed(2048, slow, name)],
        "cost": {"calibration_s": 41.5 if name.startswith("t5") else 0.01, "training_s": 310.0 if tokens else 0.0}
        | {"tokens": tokens},
        "broken": None,
    }


def timed(length: int, slow: float, name: str) -> JSON:
    """Times of an arm, decoding a little nearer to the source's than prefill."""
    over = 1.0 if name == "source" else slow
    decode = 1 + 0.6 * (over - 1)
    return {
        **{"length": length, "prefill_s": length * 6e-4 * over, "first_token_s": length * 6e-4 * over + 0.03},
        **{"decode_s": 0.031 * decode, "prefill_over": over, "decode_over": decode},
        "peak_bytes": int(length * 50_000 * over),
    }


def result(
    names: Sequence[str] = tuple(ARMS), tokens: int = 0, spread: float = 0.012, **constraints: float | None
) -> JSON:
    """A whole result, with a recommendation made from its figures; with ``tokens`` each arm comes trained too."""
    rows = [row(name, budget, spread) for budget in ([0, tokens] if tokens else [0]) for name in names]
    document = {
        "version": "0.1.0",
        "command": f"rpb compare org/model --target-length {TARGET}",
        "source": "org/model",
        "mechanism": "rope",
        "context": CONTEXT,
        "target": TARGET,
        "text": "novel.txt",
        "plan": {"lengths": [2048, CONTEXT, TARGET], "tokens": TARGET, "asked": [], "heal": tokens, "seeds": 1},
        "rows": rows,
        "pairs": [
            {"a": a["id"], "b": b["id"], "at": at, **gap(b[part]["mean"] - a[part]["mean"], spread)}
            for at, part in (("target", "beyond"), ("inside", "inside"))
            for a, b in combinations(rows, 2)
        ],
        "skipped": {"interpolated": "the source's positions (rope) are no table of vectors to interpolate"},
        "seconds": 812.4,
    }
    return recommended(document, **constraints)


def recommended(document: JSON, **constraints: Any) -> JSON:
    """The same with the recommendation that its figures lead to."""
    bounds = Constraints(**constraints)
    answer = recommend(table(document), bounds)
    return {**document, "headline": answer.headline, "constraints": asdict(bounds), "recommendation": asdict(answer)}


def without(document: JSON, *parts: str, of: str | None = None) -> JSON:
    """The same without some parts of its rows, or of the row ``of``: as if they had not been measured."""
    empty = {"inside": None, "beyond": None}
    rows = [
        {**row, **{part: empty.get(part, []) for part in parts}} if of in (None, row["id"]) else row
        for row in document["rows"]
    ]
    return {**document, "rows": rows}


def broken(document: JSON, name: str, why: str) -> JSON:
    """The same with a row that did not run at the target."""
    rows = [{**row, "broken": why} if row["id"] == name else row for row in document["rows"]]
    pairs = [p for p in document["pairs"] if p["at"] == "inside" or name not in (p["a"], p["b"])]
    return without({**document, "rows": rows, "pairs": pairs}, "beyond", "by_position", of=name)
