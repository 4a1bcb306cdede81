"""The first screen of a diagnosis, in a user's words: does it run right, what was lost and where, why, what next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE
from rpb_retrofit.diagnosis.costs import retrofit_costs
from rpb_retrofit.diagnosis.finding import QUARTER

RUNS, LOST, CAUSE, NEXT = (
    "Does it run right?",
    "What was lost, and where?",
    "The most likely cause",
    "What to type next",
)

AGAIN = "rpb retrofit {source} {retrofit}-again --calibration TEXT"
HEAL = "rpb finetune {retrofit} {retrofit}-healed --data TEXT"

ROTARY = " --calibrate tables+content --keep-frequencies auto"
"""What helps heads and neighbours most, where positions rotate."""

COMMANDS: Mapping[str, str] = {
    "heads_lost": f"{AGAIN} --buckets auto",
    "local_order_lost": f"{AGAIN} --buckets auto",
    "far_order_lost": f"{AGAIN} --buckets auto",
    "outside_trained_length": f"{AGAIN} --calibration-length 8k",
    "attention_spreads": HEAL,
    "other_temperature": HEAL,
    "retrieval_lost": HEAL,
    "domain_drift": HEAL,
    "short_context_forgotten": HEAL,
    "not_fitted": AGAIN,
}
"""By hypothesis, what mends it; of the others, that the model runs wrongly or its numbers are not as meant, a retrofit
of the source anew."""


def summary(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """The answers, a sentence or more each, of what `Diagnosis.to_dict` says without them."""
    return {RUNS: _runs(result), LOST: _lost(result), CAUSE: _cause(result), NEXT: [_next(result)]}


def _runs(result: Mapping[str, Any]) -> list[str]:
    deep = [h for h in result["hypotheses"] if h["kind"] in ("running", "numbers")]
    wrong = [h["cause"] for h in deep if h["confirmed"]]
    if wrong:
        return [f"No: {'; '.join(wrong)}."]
    unknown = [h["cause"] for h in deep if h["finding"]["verdict"] == "can't tell"]
    lines = [f"{len(deep) - len(unknown)} ways to run wrongly, or to hold wrong numbers, were tested: none was found."]
    if unknown:
        lines.append(f"Could not be told: {'; '.join(unknown)}.")
    return [f"Yes, as far as can be told. {lines[0]}" if unknown else f"Yes. {lines[0]}", *lines[1:]]


def _lost(result: Mapping[str, Any]) -> list[str]:
    figures, lines = result["figures"], []
    if costs := retrofit_costs(figures):
        by_length = ", ".join(
            f"{c['mean']:+.3f} at {c['length']:,} tokens{'' if c['real'] else ' (not sure)'}" for c in costs
        )
        lines.append(f"Loss above the {costs[0]['above']}, in nats a token: {by_length}.")
    retrieval = figures.get("retrieval") or {}
    gains = {(row["arm"], row["distance"]): row["mean"] for row in retrieval.get("induction", [])}
    spans = [
        f"{gain:.1f} of {gains[SOURCE, distance]:.1f} nats at {distance:,} tokens"
        for (arm, distance), gain in gains.items()
        if arm == RETROFIT and (SOURCE, distance) in gains
    ]
    if spans:
        lines.append(f"What a repeated span gains, of what it gains in the source: {', '.join(spans)}.")
    worse = [
        f"{row['kind']} {row['correct']['mean']:+.0%}"
        for row in retrieval.get("compared", [])
        if row["correct"]["real"] and row["correct"]["mean"] < 0
    ]
    if retrieval.get("compared"):
        lines.append(f"Questions answered right: {', '.join(worse) or 'no difference found'}.")
    return lines or ["Not measured: that takes a source or a control, and a model that predicts the next token."]


def _cause(result: Mapping[str, Any]) -> list[str]:
    by_name = {h["name"]: h for h in result["hypotheses"]}
    causes = [by_name[name] for name in result["causes"]]
    if not causes:
        return ["None was found."]
    lines = [f"{h['cause']}{_share(h)}" for h in causes]
    if causes[0]["explains"]:
        return [f"{lines[0][0].upper()}{lines[0][1:]}.", *([f"Also: {'; '.join(lines[1:])}."] if lines[1:] else [])]
    return [f"No single one explains {QUARTER:.0%} of what was lost. Contributing: {'; '.join(lines)}."]


def _share(hypothesis: Mapping[str, Any]) -> str:
    share, gain = hypothesis["share"], hypothesis["finding"]["gain"]
    if share is not None:
        return f" ({share:.0%} of what was lost)" if share > 0.005 else " (none of what was lost on this text)"
    return "" if gain is None else f" ({gain:.3f} nats a token)"


def _next(result: Mapping[str, Any]) -> str:
    arms = {role: shlex.quote(name) for role, name in result["arms"].items()}
    places = {RETROFIT: arms[RETROFIT], SOURCE: arms.get(SOURCE, "SOURCE")}
    if result["causes"]:
        first = result["causes"][0]
        more = ROTARY if result["mechanism"] == "rope" and first in ("heads_lost", "local_order_lost") else ""
        return COMMANDS.get(first, AGAIN).format(**places) + more
    probes = [h["name"] for h in result["hypotheses"] if h["finding"]["failed"]]
    if probes:
        return f"rpb diagnose {places[RETROFIT]} --source {places[SOURCE]} --only {','.join(probes)}"
    costs = [c for c in (result["figures"].get("loss") or {}).get("costs", []) if c["arm"] == RETROFIT]
    worse = any(cost["real"] and cost["mean"] > 0 for cost in costs)
    return (HEAL if worse else "rpb card {retrofit}").format(**places)
