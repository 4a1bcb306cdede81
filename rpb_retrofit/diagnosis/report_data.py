"""The figures that a report shows beside its verdicts, as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from rpb_retrofit.diagnosis.arms import CONTROL, RETROFIT, SOURCE, UNTRAINED
from rpb_retrofit.diagnosis.costs import Figures
from rpb_retrofit.diagnosis.factorial import Crossing, factorial
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.evaluation.retrieval import cells
from rpb_retrofit.evaluation.speed import SpeedResult
from rpb_retrofit.evaluation.statistics import Difference, controlled, paired, proportions
from rpb_retrofit.runtime.buckets import bucket_of


def loss_figures(measurements: Measurements) -> Figures:
    """Mean loss by length and arm; what each arm costs above what it stands beside, all lengths controlled together."""
    roles, lengths = [role for role, _ in measurements.arms], measurements.text.lengths
    means = {
        role: {str(n): losses.mean for n in lengths if (losses := measurements.losses(role, n)) is not None}
        for role in roles
    }
    pairs = [
        (role, above)
        for role, above in (
            (RETROFIT, SOURCE),
            (CONTROL, SOURCE),
            (RETROFIT, CONTROL),
            (RETROFIT, UNTRAINED),
            (UNTRAINED, SOURCE),
        )
        if role in roles and above in roles
    ]
    measured = [
        (role, above, n, cost)
        for role, above in pairs
        for n in measurements.text.lengths
        if (cost := measurements.losses.cost(n, role, above)) is not None
    ]
    sure = controlled([cost for *_, cost in measured])
    costs = [
        {"arm": role, "above": above, "length": n, **_difference(cost)}
        for (role, above, n, _), cost in zip(measured, sure, strict=True)
    ]
    return {
        "mean": means,
        "costs": costs,
        "by_position": _by_position(measurements, roles),
        "key_tokens": _key(measurements),
    }


def _difference(difference: Difference) -> Figures:
    return {**asdict(difference), "real": difference.real}


def _by_position(measurements: Measurements, roles: Sequence[str]) -> list[Figures]:
    """Loss by position with 95% bands, each in the shortest windows that hold it, of which there are most."""
    measured = []
    for role in roles:
        taken = [losses for n in measurements.text.lengths if (losses := measurements.losses(role, n)) is not None]
        first = 1
        while taken and first < taken[-1].length:
            losses = next(losses for losses in taken if losses.length > first)
            last = min(2 * first - 1, losses.length - 1)
            part = losses.at(first, last)
            band = paired(part.losses.flatten().tolist(), part.clusters().flatten().tolist())
            measured.append(
                {
                    **{"arm": role, "length": losses.length, "first": first, "last": last},
                    **{"nll": band.mean, "low": band.low, "high": band.high},
                }
            )
            first *= 2
    return measured


def _key(measurements: Measurements) -> Figures | None:
    """The cost on the tokens that the source predicts well only with far context."""
    cost = measurements.losses.key_cost()
    if cost is None:
        return None
    return {
        **_difference(cost),
        "tokens": len(measurements.losses.key) if measurements.losses.key is not None else 0,
        "length": measurements.text.lengths[-1],
    }


def retrieval_figures(measurements: Measurements) -> Figures:
    """Repeated spans by distance, local order, and questions by kind, length and depth; differences item by item."""
    roles = [role for role, _ in measurements.arms]
    spans = {role: rows for role in roles if (rows := measurements.tasks.inductions(role))}
    orders = {role: rows for role in roles if (rows := measurements.tasks.local_orders(role))}
    questions = {role: rows for role in roles if (rows := measurements.tasks.questions(role))}
    measured: Figures = {"induction": [], "local_order": [], "questions": [], "compared": []}
    for role, rows in spans.items():
        for distance in sorted({row["distance"] for row in rows}):
            gains = [row["gain"] for row in rows if row["distance"] == distance]
            band = paired(gains, list(range(len(gains))))
            measured["induction"].append({"arm": role, "distance": distance, **_difference(band)})
    for role, rows in orders.items():
        band = paired([row["gain"] for row in rows], list(range(len(rows))))
        measured["local_order"].append({"arm": role, **_difference(band)})
    for role, rows in questions.items():
        measured["questions"] += [{"arm": role, **asdict(cell)} for cell in cells(rows)]
    if SOURCE in questions and RETROFIT in questions:
        source, own = questions[SOURCE], questions[RETROFIT]
        kinds = sorted({row["kind"] for row in own})
        right = [
            proportions([r["correct"] for r in source if r["kind"] == k], [r["correct"] for r in own if r["kind"] == k])
            for k in kinds
        ]
        loss = [
            paired(
                [b["nll"] - a["nll"] for a, b in zip(source, own, strict=True) if b["kind"] == k],
                [row["number"] for row in own if row["kind"] == k],
            )
            for k in kinds
        ]
        measured["compared"] = [
            {"kind": kind, "correct": _difference(c), "nll": _difference(n)}
            for kind, c, n in zip(kinds, controlled(right), controlled(loss), strict=True)
        ]
    return measured


OFFSETS = 64
"""Offsets at which a bias is shown, spread evenly over their logarithm."""


def bias_figures(measurements: Measurements) -> Figures:
    """The bias by offset, of every attention and head, each head's mean removed; beside it the best table of the same
    buckets for what the source attends to."""
    biases = measurements.arms.biases
    if not biases:
        return {}
    bucketing = next(iter(biases.values())).bucketing
    reach = max(2 * bucketing.max_distance, 16)
    steps = torch.logspace(0, torch.log2(torch.tensor(float(reach))), OFFSETS, base=2).round().long().unique()
    near = torch.cat([torch.zeros(1, dtype=torch.long), steps])
    offsets = torch.cat([-steps.flip(0), near]) if bucketing.bidirectional else near
    with torch.no_grad():
        own = {name: bias(offsets.to(bias.weight.device)).double().cpu() for name, bias in biases.items()}
    fidelity = measurements.fidelity
    best = {}
    if fidelity is not None:
        best = {
            name: table[:, bucket_of(offsets, biases[name].bucketing)].double()
            for name, table in fidelity.tables.items()
        }
    return {
        "offsets": offsets.tolist(),
        "retrofit": {name: (line - line.mean(1, True)).tolist() for name, line in own.items()},
        "source": {name: (line - line.mean(1, True)).tolist() for name, line in best.items()},
    }


def coverage_figures(measurements: Measurements) -> Figures:
    """Share of all pairs of tokens that fall into each bucket, at the longest length; pairs that trained each."""
    biases = measurements.arms.biases
    if not biases:
        return {}
    bucketing = next(iter(biases.values())).bucketing
    length = max(measurements.text.lengths)
    offset = torch.arange(-length + 1 if bucketing.bidirectional else 0, length)
    pairs = (length - offset.abs()).double()
    share = torch.zeros(bucketing.num_buckets, dtype=torch.double).index_add(0, bucket_of(offset, bucketing), pairs)
    return {
        "length": length,
        "share": (share / share.sum()).tolist(),
        "trained_pairs": None if measurements.pairs is None else list(measurements.pairs),
    }


def pattern_figures(measurements: Measurements) -> list[Figures]:
    """Mean entropy of attention by the number of visible keys, over all heads, with its quartiles."""
    measured = []
    for role, _ in measurements.arms:
        seen = measurements.attention_patterns(role)
        if seen is None:
            continue
        spread = torch.cat(list(seen.spread.values()))  # (heads of all layers, bins)
        for number in range(spread.shape[1]):
            column = spread[:, number].double()
            low, high = column.quantile(torch.tensor([0.25, 0.75], dtype=torch.double)).tolist()
            measured.append(
                {"arm": role, "keys": 8 * 2**number, "mean": column.mean().item(), "low": low, "high": high}
            )
    return measured


def factorial_figures(crossings: Sequence[Crossing]) -> list[Figures]:
    """The crossings' cells and effects."""
    return [
        {
            "name": c.name,
            "about": c.about,
            "sentence": str(c),
            "cells": dict(zip(("source", "source_with", "retrofit", "retrofit_with"), c.cells, strict=True)),
            **{effect: _difference(getattr(c, effect)) for effect in ("gap", "method", "factor", "both")},
        }
        for c in crossings
    ]


def fidelity_figures(measurements: Measurements) -> Figures | None:
    """Mean KL from the source's attention by layer: of the tables, of none, of the best of the same buckets."""
    measured = measurements.fidelity
    if measured is None:
        return None
    return {
        name: {
            "own": kl.mean().item(),
            "none": measured.zeros[name].mean().item(),
            "best": measured.refit[name].mean().item(),
        }
        for name, kl in measured.own.items()
    }


def speed_figures(measurements: Measurements) -> list[Figures]:
    """Prefill, first token, decoding and peak memory by length, and what was skipped."""
    measured = []
    for role, results in measurements.speed.items():
        for result in results:
            if isinstance(result, SpeedResult):
                measured.append(
                    {
                        "arm": role,
                        "length": result.length,
                        "prefill_tokens_per_s": result.prefill_tokens_per_s,
                        "first_token_s": result.first_token_s.median,
                        "decode_tokens_per_s": result.decode_tokens_per_s,
                        "peak_bytes": result.peak_bytes,
                        "rounds": result.rounds,
                    }
                )
            else:
                measured.append({"arm": role, "length": result.length, "skipped": result.reason})
    return measured


def all_figures(measurements: Measurements) -> Figures:
    """Everything that a report shows. What cannot be measured is noted in ``failed``, and the rest goes on."""
    causal = measurements.arms.causal
    parts: dict[str, tuple[Callable[[], Any], Any]] = {
        "loss": (lambda: loss_figures(measurements) if causal else None, None),
        "retrieval": (lambda: retrieval_figures(measurements) if causal else None, None),
        "bias": (lambda: bias_figures(measurements), {}),
        "fidelity": (lambda: fidelity_figures(measurements), []),
        "coverage": (lambda: coverage_figures(measurements), None),
        "entropy": (lambda: pattern_figures(measurements) if causal else [], []),
        "factorial": (lambda: factorial_figures(factorial(measurements)), []),
        "speed": (lambda: speed_figures(measurements) if causal else [], []),
    }
    return {
        name: measurements.attempt(f"the figures of {name}", measure, nothing)
        for name, (measure, nothing) in parts.items()
    }
