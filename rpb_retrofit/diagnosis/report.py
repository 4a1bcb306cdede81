"""The report of a diagnosis: one page that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpb_retrofit.diagnosis.costs import retrofit_costs
from rpb_retrofit.diagnosis.exhibits import exhibits
from rpb_retrofit.diagnosis.result import Diagnosis
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.files.whole_file import write_whole
from rpb_retrofit.pages.page import write
from rpb_retrofit.pages.words import interval

EVIDENCE: Mapping[str, Sequence[str]] = {
    "precision": ["bias"],
    "bias_dropped": ["bias"],
    "offset_reversed": ["bias"],
    "off_by_one": ["bias"],
    "wrong_scale": ["factorial"],
    "tables_not_loaded": ["bias"],
    "tables_shared": ["bias"],
    "wrong_order": ["bias"],
    "other_buckets": ["bias", "fidelity"],
    "untrained_buckets": ["coverage"],
    "foreign_tables": ["fidelity", "bias"],
    "far_order_lost": ["coverage", "fidelity"],
    "local_order_lost": ["local-order", "fidelity"],
    "domain_drift": ["cost"],
    "short_context_forgotten": ["cost"],
    "outside_trained_length": ["loss-by-position"],
    "retrieval_lost": ["induction", "questions"],
    "heads_lost": ["induction"],
    "attention_spreads": ["entropy"],
    "other_temperature": ["factorial", "entropy"],
}
"""By hypothesis, the exhibits to look at. What is not here is computed exactly, and its sentence is all there is."""

KINDS: Mapping[str, str] = {
    "running": "Does the model compute what its weights and its config say?",
    "numbers": "Are the numbers what they were meant to be?",
    "choice": "Can the settings express what the source did?",
    "behaviour": "What does the model as a whole do otherwise than its source?",
}
"""What the hypotheses of each kind ask, the deepest first."""

SYMBOLS: Mapping[str, str] = {"confirmed": "●", "can't tell": "?", "excluded": "○"}
"""By verdict, those to be read first in front."""


def write_folder(diagnosis: Diagnosis, folder: Path, command: str) -> None:
    """Write report.html and report.json into a new folder, which appears whole or not at all. CheckpointError where it
    exists, or cannot be written."""
    result = diagnosis.to_dict()
    with whole_folder(folder) as part:
        write_report(result, command, part / "report.html")
        write_whole(part / "report.json", json_text({"command": command, **result}))


def write_report(result: Mapping[str, Any], command: str, file: Path) -> None:
    """Write a page about ``result``, what `Diagnosis.to_dict` says, to ``file``; ``command`` is what repeats it."""
    figures, shown_exhibits = result["figures"], list(exhibits(result["figures"]))
    cost = _largest_cost(retrofit_costs(figures))
    shown = {exhibit.name: exhibit.title for exhibit in shown_exhibits}
    hypotheses = {hypothesis["name"]: hypothesis for hypothesis in result["hypotheses"]}
    write(
        file,
        "rpb_retrofit.diagnosis",
        "report.html",
        title=f"Diagnosis of {result['arms']['retrofit']}",
        contents={"repeat": "How to repeat it", "hypotheses": "The hypotheses", **shown},
        result=result,
        summary=result["summary"],
        command=command,
        exhibits=shown_exhibits,
        evidence={
            name: {anchor: shown[anchor] for anchor in EVIDENCE.get(name, ()) if anchor in shown} for name in hypotheses
        },
        groups=_groups(result["hypotheses"]),
        kinds=KINDS,
        symbols=SYMBOLS,
        causes=[hypotheses[name] for name in result["causes"]],
        failed={
            **{h["name"]: h["finding"]["because"] for h in result["hypotheses"] if h["finding"]["failed"]},
            **result.get("failed", {}),
        },
        hypotheses=hypotheses,
        untold=[
            h for h in result["hypotheses"] if h["finding"]["verdict"] == "can't tell" and not h["finding"]["failed"]
        ],
        cost=cost or {"real": False},
        cost_sentence=_cost_sentence(cost),
    )


def _largest_cost(costs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of what the retrofit loses by length, the most; what is real goes first."""
    if not costs:
        return None
    largest = max(costs, key=lambda cost: (cost["real"] and cost["mean"] > 0, cost["mean"]))
    return {**largest, "lengths": len(costs)}


def _cost_sentence(largest: Mapping[str, Any] | None) -> str:
    """What it costs, with its uncertainty. None found is not the same as none."""
    if largest is None:
        return "Not measured: that takes a source or a control, and a model that predicts the next token."
    count, above = largest["lengths"], largest["above"]
    lengths = f"the largest cost at {count} lengths" if count > 1 else "the only length measured"
    sentence = f"{interval(largest)} nats a token against the {above} in windows of {largest['length']}, {lengths}."
    if largest["real"]:
        return sentence if largest["mean"] > 0 else f"Nothing: {sentence} The retrofit's loss is the lower one."
    if not math.isfinite(largest["detectable"]):
        return f"No difference found: {sentence} There is too little text: no effect of any size could have been seen."
    return (
        f"No difference found: {sentence} That is not to say that there is none: the smallest effect that would have "
        f"been seen 4 times in 5 is {largest['detectable']:.3f}."
    )


def _groups(hypotheses: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The hypotheses by kind, the deepest kind first, and in each by verdict, those to be read first in front."""
    order = list(SYMBOLS)
    shown_exhibits = {
        kind: sorted((h for h in hypotheses if h["kind"] == kind), key=lambda h: order.index(h["finding"]["verdict"]))
        for kind in KINDS
    }
    return {kind: members for kind, members in shown_exhibits.items() if members}
