"""The card of scripts/heal.py: Markdown tables, and a picture, of what its arms' results hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import pyplot as plt

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.plots import STYLE, log2_positions
from rpb_retrofit.evaluation.statistics import Difference, paired
from rpb_retrofit.pages.drawing import LINE_STYLES, SIZE, Label
from rpb_retrofit.pages.labels import name_ends

SOURCE = "source"

FLAT, AIMS = 0.05, {"kept": 0.05, "full": 0.15}
"""Nats a token that the end of a long window may lose, and an arm inside the context above the control."""


def write_card(out: Path, file: Path, about: Mapping[str, str]) -> None:
    """A Markdown card of all arms that have results in ``out``, as far as they came, and its picture beside it.

    ``about``: the arms in their order, the source first, and what each is. DataError where there is none.
    """
    results = {}
    for arm in about:
        if (stored := out / arm / "result.json").exists():
            results[arm] = json.loads(stored.read_text())
    if not results:
        raise DataError(f"'{out}' holds no result: run some arms first")
    plan = next(iter(results.values()))["plan"]
    parts = {arm: one["parts"] for arm, one in results.items()}
    drawn = file.with_suffix(".svg")
    with plt.rc_context({**STYLE, "svg.hashsalt": "rpb_retrofit"}):
        figure = picture(parts)
        figure.savefig(drawn, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    shown = f"![loss at the end of ever longer windows, by arm]({drawn.name})"
    sections = [_head(plan), _aims(parts, plan), _inside(parts), _beyond(parts), shown]
    sections += [_questions(parts), _spans(parts), _training(parts), _positions(parts), _arms(parts, about)]
    file.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def picture(parts: dict[str, Any]) -> Any:
    """Loss at the end of ever longer windows, a line for each arm."""
    figure, axes = plt.subplots(figsize=SIZE)
    ends = []
    for arm, style in zip(parts, LINE_STYLES, strict=False):
        places = [(n, one["nll"]) for n, one in _lengths(parts, arm, "beyond").items() if "nll" in one]
        if places:
            axes.plot(*zip(*places, strict=True), color=style.colour, ls=style.dash, marker=style.marker, ms=4)
            ends.append(Label(arm, *places[-1], style))
    log2_positions(axes)
    axes.set_xlabel("tokens of the window")
    axes.set_ylabel("loss at its end (nats a token)")
    name_ends(axes, ends)
    return figure


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def apart(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Difference:
    """How much more the windows ``b`` lose than ``a``, the same ones, by document."""
    places = [[(one["document"], one["end"]) for one in each] for each in (a, b)]
    assert places[0] == places[1], "both read the same windows"
    return paired([y["nll"] - x["nll"] for x, y in zip(a, b, strict=True)], [one["document"] for one in a])


def _above_source(parts: dict[str, Any], arm: str, when: str) -> Difference | None:
    source = parts.get(SOURCE, {}).get("after: inside")
    own = parts[arm].get(f"{when}: inside")
    return apart(source["windows"], own["windows"]) if source and own and arm != SOURCE else None


def _lengths(parts: dict[str, Any], arm: str, part: str) -> dict[int, dict[str, Any]]:
    return {one["length"]: one for one in parts[arm].get(f"after: {part}", {}).get("lengths", [])}


def _lost_at(parts: dict[str, Any], arm: str) -> dict[int, Difference]:
    """By length, what the last tokens lose to the same ones at the end of a window of the context."""
    scored = {n: one for n, one in _lengths(parts, arm, "beyond").items() if "windows" in one}
    if not scored or (first := min(scored)) == max(scored):
        return {}
    return {n: apart(scored[first]["windows"], one["windows"]) for n, one in scored.items() if n != first}


def _head(plan: dict[str, Any]) -> str:
    name, data = Path(plan["source"]).name, ", ".join(f"`{Path(file).name}`" for file in plan["data"])
    texts = ", ".join(f"`{Path(file).name}`" for file in plan["held_out"])
    return (
        f"# `{name}` with T5's bias, healed on {plan['tokens']:,} tokens at its own context\n\n"
        f"Calibrated on {plan['calibration']:,} tokens of {data}, in windows of {plan['length']:,} tokens and shorter "
        f"ones, then trained on {plan['tokens']:,} tokens of it in sequences of {plan['length']:,} to predict what the "
        f"source predicts. Scored on texts that nothing was fitted to: {texts}. The control, the source by the same "
        "recipe, is the source: it has nothing to learn from itself.\n\n"
        "In brackets: 95% intervals over documents."
    )


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def _aims(parts: dict[str, Any], plan: dict[str, Any]) -> str:
    lines = []
    for kind, aim in AIMS.items():
        for arm in (arm for arm in parts if arm.startswith(kind)):
            if (above := _above_source(parts, arm, "after")) is not None:
                lines.append(
                    f"- {arm} inside the context, at most {aim:.2f} above the control: {above.interval}, "
                    f"{_verdict(above.mean <= aim)}."
                )
    for arm in (arm for arm in parts if arm != SOURCE):
        for length, lost in _lost_at(parts, arm).items():
            lines.append(
                f"- {arm} flat at {length:,} tokens, the last positions losing at most {FLAT:.2f} to the same tokens "
                f"at {plan['length']:,}: {lost.interval}, {_verdict(lost.mean <= FLAT)}."
            )
    return "\n".join(["What was aimed at, in nats a token, and what came of it:\n", *(lines or ["- nothing yet."])])


def _inside(parts: dict[str, Any]) -> str:
    rows = []
    for arm in parts:
        cell = [arm]
        for when in ("before", "after"):
            own, above = parts[arm].get(f"{when}: inside"), _above_source(parts, arm, when)
            cell += [f"{own['nll']:.4f}" if own else "", above.interval if above else ""]
        rows.append(cell)
    head = ["arm", "calibrated only", "above the source", "healed", "above the source"]
    return f"Loss inside the context, in nats a token:\n\n{table(head, rows)}"


def _beyond(parts: dict[str, Any]) -> str:
    lengths = sorted({length for arm in parts for length in _lengths(parts, arm, "beyond")})
    if not lengths:
        return "Beyond the context nothing was measured."
    rows = []
    for arm in parts:
        by_length, lost = _lengths(parts, arm, "beyond"), _lost_at(parts, arm)
        row = [arm]
        for length in lengths:
            one = by_length.get(length, {})
            told = f"{one['nll']:.4f}" if "nll" in one else str(one.get("failed", ""))[:13]
            row.append(f"{told}; {lost[length].interval}" if length in lost else told)
        rows.append(row)
    return (
        "Loss of the same tokens, the last positions of a window, by its length; and what they lose to those at the "
        f"end of the shortest:\n\n{table(['arm', *(f'{n:,}' for n in lengths)], rows)}"
    )


def _questions(parts: dict[str, Any]) -> str:
    rows = []
    for arm in parts:
        measured = _lengths(parts, arm, "questions").values()
        by_kind: dict[str, list[str]] = {row["kind"]: [] for one in measured for row in one.get("rows", [])}
        for one in measured:
            for kind in by_kind:
                asked = [row for row in one.get("rows", []) if row["kind"] == kind]
                right = sum(row["correct"] for row in asked)
                nll = f", {fmean(row['nll'] for row in asked):.2f}" if asked else ""
                by_kind[kind].append(f"{right} of {len(asked)}{nll}" if asked else str(one.get("failed", "-"))[:13])
        rows += [[arm, kind, *told] for kind, told in by_kind.items() if told]
    lengths = sorted({length for arm in parts for length in _lengths(parts, arm, "questions")})
    if not rows:
        return "No questions were asked."
    head = ["arm", "kind", *(f"{n:,}" for n in lengths)]
    return f"Questions answered, and the answer's loss in nats a token, by length:\n\n{table(head, rows)}"


def _spans(parts: dict[str, Any]) -> str:
    lengths = sorted({length for arm in parts for length in _lengths(parts, arm, "spans")})
    if not lengths:
        return "No repeated spans were measured."
    rows = []
    for arm in parts:
        by_length = _lengths(parts, arm, "spans")
        row = [by_length.get(length, {}) for length in lengths]
        rows.append([arm, *(f"{one['gain']:+.2f}" if "gain" in one else one.get("failed", "")[:13] for one in row)])
    head = ["arm", *(f"{n:,}" for n in lengths)]
    return "What a span of random tokens gains from having come before, in nats a token, by length:\n\n" + table(
        head, rows
    )


def _training(parts: dict[str, Any]) -> str:
    rows = []
    for arm in parts:
        made, trained = parts[arm].get("made"), parts[arm].get("trained")
        row = [arm, f"{made['whole']['seconds']:.0f}" if made else ""]
        if trained:
            peak = trained["whole"].get("peak_bytes")
            losses = trained["losses"]
            row += [f"{trained['scored_tokens']:,}", f"{trained['seconds']:.0f}", f"{trained['tokens_per_s']:,.0f}"]
            row += [f"{peak / 2**30:.1f}" if peak else "", f"{losses[0]:.3f}, {losses[-1]:.3f}"]
        rows.append(row + [""] * (7 - len(row)))
    head = ["arm", "s to calibrate", "tokens scored", "s to train", "tokens/s", "GiB at most", "first and last loss"]
    return table(head, rows)


def _positions(parts: dict[str, Any]) -> str:
    known = {arm: each["after: inside"]["by_position"] for arm, each in parts.items() if "after: inside" in each}
    if not known:
        return ""
    bins = [f"{first:,}-{last:,}" for first, last, _ in next(iter(known.values()))]
    rows = [[place, *(f"{each[i][2]:.3f}" for each in known.values())] for i, place in enumerate(bins)]
    return f"Loss by position in the window, healed:\n\n{table(['positions', *known], rows)}"


def _arms(parts: dict[str, Any], about: Mapping[str, str]) -> str:
    return "\n".join(["The arms:\n", *(f"- **{arm}**: {about[arm]}" for arm in parts)])
