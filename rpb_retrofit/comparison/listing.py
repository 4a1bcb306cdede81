"""All rows of a comparison in one table, and all of them held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rpb_retrofit.comparison.candidates import Candidate
from rpb_retrofit.comparison.ranking import Ranking
from rpb_retrofit.evaluation.statistics import Difference
from rpb_retrofit.pages.page import Exhibit, Table
from rpb_retrofit.pages.words import EFFECT, effect, number

NONE_FOUND = "≈"
"""Stands before a difference that may be chance."""


def arms(ranking: Ranking) -> Table:
    """A row for each arm and budget of training, the lowest loss at the target first; without columns of nothing."""
    candidates = {candidate.name: candidate for candidate in ranking.figures.candidates}
    inside = next((row["inside"]["length"] for row in ranking.rows.values() if row["inside"]), 0)
    columns = {
        f"loss at {ranking.result['target']:,}": lambda row, _: _loss(row["beyond"]),
        "above the source (95% interval)": lambda row, _: _above(row["beyond"]),
        f"loss inside, at {inside:,}": lambda row, _: _loss(row["inside"]),
        "prefill": lambda row, _: _last_timed(row, "prefill_over"),
        "decoding": lambda row, _: _last_timed(row, "decode_over"),
        "memory": lambda _, candidate: _times(candidate.memory),
        "questions right": lambda _, candidate: None if candidate.retrieval is None else f"{candidate.retrieval:.0%}",
        "trained on": lambda row, _: f"{row['tokens']:,}" if row["tokens"] else "0",
        "calibration (s)": lambda row, _: f"{row['cost']['calibration_s']:,.0f}",
    }
    cells = {
        title: [column(row, candidates[name]) for name, row in ranking.rows.items()]
        for title, column in columns.items()
    }
    shown = {title: column for title, column in cells.items() if any(cell is not None for cell in column)}
    rows = [
        [ranking.titled(name), *("not measured" if cell is None else cell for cell in row)]
        for name, row in zip(ranking.rows, zip(*shown.values(), strict=True), strict=True)
    ]
    return Table(
        "The lowest loss at the target first",
        ("arm", *shown),
        rows,
    )


def _loss(loss: Mapping[str, Any] | None) -> str | None:
    return None if loss is None else number(loss["mean"])


def _above(loss: Mapping[str, Any] | None) -> str | None:
    if loss is None:
        return None
    if (gap := loss["above"]) is None:
        return "the reference"
    mean = f"{'' if gap['real'] else f'{NONE_FOUND} '}{gap['mean']:+.3f}"
    if not (math.isfinite(gap["low"]) and math.isfinite(gap["high"])):
        return f"{mean} (no interval)"
    return f"{mean} ({gap['low']:+.3f} to {gap['high']:+.3f})"


def _last_timed(row: Mapping[str, Any], key: str) -> str | None:
    return next((_times(s[key]) for s in reversed(row["speed"]) if "skipped" not in s), None)


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def pairs(ranking: Ranking) -> Exhibit | None:
    """Who really differs from whom at the target: a table of all pairs, and who is not behind the first."""
    ranked, gaps = ranking.ranked, _differences(ranking)
    if not gaps:
        return None
    real = sum(gap.real for gap in gaps.values()) // 2
    cells = [
        [f"{place}. {ranking.titled(row.name)}", *(_cell(gaps.get((column.name, row.name))) for column in ranked)]
        for place, row in enumerate(ranked, 1)
    ]
    listed = [
        Table(
            f"The second less the first, {where}",
            ("first", "second", *EFFECT),
            [[pair["a"], pair["b"], *effect(pair)] for pair in ranking.result["pairs"] if pair["at"] == at],
        )
        for at, where in (("target", "at the target"), ("inside", "inside the context"))
    ]
    return Exhibit(
        "pairs",
        "Who really differs from whom",
        f"Each row's loss at the target less that of the column, whose number is that of its row; {NONE_FOUND}: no "
        "difference found. All pairs are controlled together.",
        [table for table in listed if table.rows],
        sentences=[f"Of {len(gaps) // 2:,} pairs {real:,} really differ.", *_not_told_apart(ranking, ranked)],
        shown=[Table("Nats a token", ("arm", *(f"{place}." for place in range(1, len(ranked) + 1))), cells)],
    )


def _differences(ranking: Ranking) -> dict[tuple[str, str], Difference]:
    """How much more the second of a pair loses than the first, in both orders."""
    gaps = {}
    for a in ranking.ranked:
        for b in ranking.ranked:
            if a is not b and (gap := ranking.difference(a, b)) is not None:
                gaps[a.name, b.name] = gap
    return gaps


def _cell(gap: Difference | None) -> str:
    if gap is None:
        return ""
    return f"{'' if gap.real else f'{NONE_FOUND} '}{gap.mean:+.3f}"


def _not_told_apart(ranking: Ranking, ranked: Sequence[Candidate]) -> list[str]:
    anchor = ranking.anchor
    if anchor is None:
        return []
    tied = [c.name for c in ranked if (gap := ranking.behind(c)) is not None and not gap.real]
    if not tied:
        return [f"{anchor.name} really differs from all others."]
    return [f"Not told apart from {anchor.name}: {', '.join(tied)}."]
