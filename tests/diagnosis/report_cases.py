"""Diagnoses as `Diagnosis.to_dict` makes them, with every figure, for the pages and sentences about them."""

from __future__ import annotations

import math
from typing import Any

from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES, Hypothesis

ARMS = ("source", "control", "untrained", "retrofit")
LAYERS = [f"model.layers.{i}.self_attn" for i in range(2)]


def difference(mean: float, spread: float = 0.02, real: bool = True) -> dict[str, Any]:
    detectable = 1.5 * spread
    low, high = mean - spread, mean + spread
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "p": 0.01 if real else 0.6,
        "detectable": detectable,
        "items": 9,
        "clusters": 9,
        "real": real,
    }


def unbounded(mean: float) -> dict[str, Any]:
    return difference(mean, math.inf, real=False)


def result(confirmed: tuple[str, ...] = (), costs: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """A diagnosis in which some hypotheses are confirmed."""
    hypotheses = [_hypothesis(hypothesis, hypothesis.name in confirmed) for hypothesis in HYPOTHESES]
    causes = [h["cause"] for h in hypotheses if h["confirmed"]]
    headline = f"First cause: {causes[0]}." if causes else "No cause of a regression found: 25 were excluded."
    return {
        "version": "0",
        "headline": headline + (f" Also confirmed: {'; '.join(causes[1:])}." if causes[1:] else ""),
        "causes": [h["name"] for h in hypotheses if h["confirmed"]],
        "arms": {role: f"org/{role}" for role in ARMS},
        "missing": {},
        "text": "some text",
        "plan": {"lengths": [64, 256], "items": 4},
        "hypotheses": hypotheses,
        "figures": figures(costs if costs is not None else [cost(64, 0.1), cost(256, 0.2)]),
        "skipped": {},
        "failed": {},
        "mechanism": "rope",
        "seconds": 3.0,
        **more,
    }


def _hypothesis(hypothesis: Hypothesis, confirmed: bool) -> dict[str, Any]:
    name = hypothesis.name
    otherwise = "can't tell" if name == "domain_drift" else "excluded"
    return {
        "name": name,
        "cause": hypothesis.cause,
        "predicts": hypothesis.predicts,
        "kind": hypothesis.kind.name.lower(),
        "confirmed": confirmed,
        "explains": True,
        "share": 0.6 if confirmed else None,
        "finding": {
            "verdict": "confirmed" if confirmed else otherwise,
            "because": f"evidence of {name}",
            "remedy": f"remedy of {name}" if confirmed else "",
            "gain": 0.321 if confirmed else None,
            "figures": {"layers": ["a", "b"], "largest": math.inf} if name == "precision" else {},
            "failed": False,
        },
    }


def cost(length: int, mean: float, real: bool = True, above: str = "source") -> dict[str, Any]:
    return {"arm": "retrofit", "above": above, "length": length, **difference(mean, real=real)}


def figures(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every figure of a report."""
    table = {name: [[1.0, 0.0, -1.0], [0.5, 0.0, -0.5]] for name in LAYERS}
    return {
        "loss": _losses(costs),
        "retrieval": _retrieval(),
        "bias": {"offsets": [0, 1, 5], "retrofit": table, "source": {LAYERS[0]: table[LAYERS[0]]}},
        "fidelity": {name: {"own": 0.2, "none": 1.0, "best": 0.1} for name in LAYERS},
        "coverage": {"length": 256, "share": [0.5, 0.3, 0.2], "trained_pairs": [12345, 10, 0]},
        "entropy": [
            {"arm": arm, "keys": 8 * 2**n, "mean": 1.0 + n, "low": 0.5 + n, "high": 1.5 + n}
            for arm in ARMS
            for n in range(3)
        ],
        "factorial": [_crossing()],
        "speed": [
            _speed("source", 100.0),
            _speed("retrofit", 50.0),
            {"arm": "retrofit", "length": 4096, "skipped": "no memory for it"},
        ],
    }


def _losses(costs: list[dict[str, Any]]) -> dict[str, Any]:
    band = {"nll": 3.0, "low": -math.inf, "high": math.inf}
    return {
        "mean": {arm: {"64": 3.0, "256": 2.5} for arm in ARMS},
        "costs": costs,
        "by_position": [
            {"arm": arm, "length": 256, "first": position, "last": 2 * position - 1, **band}
            for arm in ARMS
            for position in (1, 2, 4)
        ],
        "key_tokens": {**difference(0.4), "tokens": 77, "length": 256},
    }


def _retrieval() -> dict[str, Any]:
    answers = (("passkey", 0.1, 0.25), ("passkey", 0.9, 0.875), ("multi-value", None, 0.5))
    return {
        "induction": [{"arm": arm, "distance": d, **difference(1 / d)} for arm in ARMS for d in (32, 128)],
        "local_order": [{"arm": arm, **unbounded(0.5)} for arm in ARMS],
        "questions": [
            {"arm": arm, "kind": kind, "length": 256, "depth": depth, "items": 8, "correct": share, "nll": 1.0}
            for arm in ARMS
            for kind, depth, share in answers
        ],
        "compared": [{"kind": "passkey", "correct": difference(-0.25), "nll": unbounded(0.1)}],
    }


def _crossing() -> dict[str, Any]:
    return {
        "name": "score scale",
        "about": "times 4",
        "sentence": "sentence of the crossing",
        "cells": {"source": 3.0, "source_with": 3.1, "retrofit": 3.2, "retrofit_with": 3.3},
        **{"gap": difference(0.3), "method": difference(0.2), "factor": difference(0.0, real=False)},
        "both": unbounded(0.1),
    }


def _speed(arm: str, tokens_per_s: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "length": 256,
        "prefill_tokens_per_s": tokens_per_s,
        "first_token_s": 0.1,
        "decode_tokens_per_s": tokens_per_s,
        "peak_bytes": None,
        "rounds": 3,
    }
