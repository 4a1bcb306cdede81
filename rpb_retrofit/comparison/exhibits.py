"""What a comparison measured, as the exhibits of its page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rpb_retrofit.comparison import pictures
from rpb_retrofit.comparison.candidates import Candidate
from rpb_retrofit.comparison.pictures import PlottedRow, Series
from rpb_retrofit.comparison.ranking import Ranking
from rpb_retrofit.pages.drawing import as_data_uri
from rpb_retrofit.pages.page import Exhibit, Table
from rpb_retrofit.pages.retrieval_exhibits import QUESTIONS, SPANS, answers, shares, shares_width
from rpb_retrofit.pages.words import EFFECT, effect, number

Row = Mapping[str, Any]

MARKERS = (
    "A filled marker is a loss that really differs from that of {anchor}, a hollow one is none; bars are 95% intervals "
    "of the difference. The scale is stretched towards the lowest loss, so that small differences show."
)


def exhibits(ranking: Ranking) -> Iterator[Exhibit]:
    """Whatever was measured, in the order of the page; the table of all rows comes after the first."""
    yield from _quality(ranking)
    yield from _inside(ranking)
    yield from _lengths(ranking)
    yield from _positions(ranking)
    yield from _questions(ranking)
    yield from _induction(ranking)
    yield from _speed(ranking)


def _quality(ranking: Ranking) -> Iterator[Exhibit]:
    plotted = [_plotted(ranking, candidate) for candidate in ranking.ranked]
    if not plotted or ranking.anchor is None:
        return
    markers = MARKERS.format(anchor=ranking.anchor.name)
    untimed = [c.name for c in ranking.ranked if c.slowdown is None]
    timed = [point for point, candidate in zip(plotted, ranking.ranked, strict=True) if candidate.slowdown is not None]
    rows = []
    for point, candidate in zip(plotted, ranking.ranked, strict=True):
        bounds = ["", ""] if ranking.behind(candidate) is None else [number(point.low), number(point.high)]
        rows.append([point.name, number(point.loss), *bounds, number(candidate.slowdown, ".2f")])
    numbers = Table("Loss at the target in nats a token", ("arm", "loss", "low (95%)", "high (95%)", "time"), rows)
    crossed = " A cross is a row that cannot be taken; why stands at the top of the page." if ranking.rejected else ""
    if not timed:
        yield Exhibit(
            "quality",
            "Loss at the target",
            f"The lowest first; times were not measured. {markers}{crossed}",
            [numbers],
            as_data_uri(lambda: pictures.ranking(plotted, "loss at the target (nats a token)")),
            "Loss at the target by arm, the lowest first; numbers in the table below.",
            least_width=30,
        )
        return
    limit = ranking.result["constraints"]["max_slowdown"]
    apart = [f"Not timed, so not in the picture: {', '.join(untimed)}."] if untimed else []
    yield Exhibit(
        "quality",
        "Quality against time",
        "Lower is better and farther left is faster: nothing measured is both lower and farther left than the steps of "
        "the front. The time is that of prefill or decoding, whichever is slower beside the source's, of the longest "
        f"prompt. {markers}{crossed}",
        [numbers],
        as_data_uri(lambda: pictures.quality(timed, limit)),
        "Loss at the target against time over the source's, a point for each arm, with the front of those that no "
        "other one beats in both; numbers in the table below.",
        apart,
        least_width=36,
    )


def _plotted(ranking: Ranking, candidate: Candidate) -> PlottedRow:
    """A row at the target; its interval is that of its difference from the anchor."""
    name, gap = candidate.name, ranking.behind(candidate)
    style = ranking.styles[name]
    budget = next(budget for budget, names in ranking.budgets.items() if name in names)
    low, high = (0.0, 0.0) if gap is None else (gap.low - gap.mean, gap.high - gap.mean)
    return PlottedRow(
        ranking.titled(name),
        candidate.loss,
        candidate.loss + low,
        candidate.loss + high,
        gap is None or gap.real,
        replace(style, marker="x") if name in ranking.rejected else style,
        budget,
        math.nan if candidate.slowdown is None else candidate.slowdown,
        candidate.fault is None,
    )


def _inside(ranking: Ranking) -> Iterator[Exhibit]:
    rows = [row for row in ranking.rows.values() if row["inside"] and row["inside"]["above"]]
    if not rows:
        return
    rows.sort(key=lambda row: row["inside"]["above"]["mean"])
    length, keep = rows[0]["inside"]["length"], ranking.result["constraints"]["must_keep"]
    plotted = []
    for row in rows:
        mean, low, high, real = (row["inside"]["above"][key] for key in ("mean", "low", "high", "real"))
        plotted.append(PlottedRow(ranking.titled(row["id"]), mean, low, high, real, ranking.styles[row["id"]]))
    trained = " Trained rows are held against the source trained likewise." if len(ranking.budgets) > 1 else ""
    yield Exhibit(
        "inside",
        "What is lost inside the context",
        f"Loss above the source's in windows of {length:,} tokens, which it was trained for.{trained} A filled marker "
        "is a difference that was found, a hollow one is none; bars are 95% intervals; the scale is stretched at 0.",
        [
            Table(
                "Nats a token above the source",
                ("arm", "loss", *EFFECT),
                [[row["id"], number(row["inside"]["mean"]), *effect(row["inside"]["above"])] for row in rows],
            )
        ],
        as_data_uri(lambda: pictures.ranking(plotted, "above the source (nats a token)", keep, "+.3f")),
        "Loss above the source inside the context by arm, the lowest first; numbers in the table below.",
        least_width=30,
    )


def _lengths(ranking: Ranking) -> Iterator[Exhibit]:
    def drawn(row: Row) -> list[Row]:
        """Means with the intervals of their differences from the reference, which has none."""
        drawn_rows: list[Row] = []
        for loss in row["losses"]:
            above, mean = loss["above"] or {"mean": 0.0, "low": 0.0, "high": 0.0, "real": True}, loss["mean"]
            reach = {key: mean + above[key] - above["mean"] for key in ("low", "high")}
            drawn_rows.append({"length": loss["length"], "mean": mean, **reach, "real": above["real"]})
        return drawn_rows

    panels = _panels(ranking, drawn)
    if not panels:
        return
    rows = [
        [row["id"], f"{loss['length']:,}", number(loss["mean"]), *(effect(loss["above"]) if loss["above"] else _NONE)]
        for row in ranking.rows.values()
        for loss in row["losses"]
    ]
    yield Exhibit(
        "lengths",
        "Loss by context length",
        f"All positions of the windows count. {_BOLD} A filled marker really differs from the source, a hollow one "
        "does not; bars are 95% intervals of the difference. The scale is stretched towards the lowest loss.",
        [Table("Losses in nats a token, and above the source's", ("arm", "tokens", "loss", *EFFECT), rows)],
        as_data_uri(lambda: pictures.by_length(panels, ranking.styles)),
        "Loss by length of the window, a line for each arm; numbers in the table below.",
        least_width=_LINES,
    )


_BOLD = "The source, the choice, the runner-up and the best of the rest are drawn boldly, the others thin."
_LINES = 30
"""Rem that lines with the names of a dozen arms at their ends need."""

_NONE = ("", "", "", "reference")


def _positions(ranking: Ranking) -> Iterator[Exhibit]:
    panels = _panels(ranking, lambda row: row["by_position"])
    if not panels:
        return
    context, target = ranking.result["context"], ranking.result["target"]
    beyond = context < target
    rows = [
        [row["id"], _range(part), *(number(part[key]) for key in ("nll", "low", "high"))]
        for row in ranking.rows.values()
        for part in row["by_position"]
    ]
    yield Exhibit(
        "positions",
        "Loss by position",
        f"In windows of {target:,} tokens. {_BOLD} The intervals of the numbers below are wider than those of the "
        "differences, as all arms read the same text. The scale is stretched towards the lowest loss."
        f"{' The line stands where the context ends that the source was trained for.' if beyond else ''}",
        [Table("Losses in nats a token", ("arm", "positions", "loss", "low (95%)", "high (95%)"), rows)],
        as_data_uri(lambda: pictures.by_position(panels, ranking.styles, context if beyond else None)),
        "Loss by position in the window, a line for each arm; numbers in the table below.",
        least_width=_LINES,
    )


def _range(part: Row) -> str:
    return str(part["first"]) if part["first"] == part["last"] else f"{part['first']} to {part['last']}"


def _questions(ranking: Ranking) -> Iterator[Exhibit]:
    """One exhibit for each kind, as not all kinds have the same depths."""
    kinds: dict[str, list[Row]] = {}
    for row in ranking.rows.values():
        for cell in row["retrieval"]:
            kinds.setdefault(cell["kind"], []).append({**cell, "arm": row["id"]})
    for kind, cells in kinds.items():
        yield Exhibit(
            f"questions-{kind}",
            f"Questions about a long context: {kind}",
            QUESTIONS,
            [answers(cells)],
            as_data_uri(partial(shares, cells, "kind", "arm")),
            "Heat map of the share of questions answered right, a row for each arm; numbers in the table below.",
            least_width=shares_width(cells),
        )


def _induction(ranking: Ranking) -> Iterator[Exhibit]:
    panels = _panels(ranking, lambda row: row["induction"])
    if not panels:
        return
    rows = [
        [row["id"], f"{span['distance']:,}", *effect(span)]
        for row in ranking.rows.values()
        for span in row["induction"]
    ]
    yield Exhibit(
        "induction",
        "A repeated span",
        f"{SPANS} {_BOLD}",
        [Table("Gain in nats a token", ("arm", "distance", *EFFECT), rows)],
        as_data_uri(lambda: pictures.induction(panels, ranking.styles)),
        "Gain from a repeated span by distance, a line for each arm; numbers in the table below.",
        least_width=_LINES,
    )


def _speed(ranking: Ranking) -> Iterator[Exhibit]:
    rows = {row["arm"]: row for row in ranking.rows.values()}  # training changes no time
    timed = {arm: [s for s in row["speed"] if "skipped" not in s] for arm, row in rows.items()}
    source = {s["length"]: s for s in timed[ranking.result["rows"][0]["arm"]]}
    panels = {}
    for title, key in (("prefill", "prefill_over"), ("decoding", "decode_over")):
        series = {arm: [_bare(s["length"], s[key]) for s in own if s[key] is not None] for arm, own in timed.items()}
        panels[title] = {arm: own for arm, own in series.items() if own}
    panels = {title: series for title, series in panels.items() if series}
    lines = [
        line
        for arm, row in rows.items()
        for s in row["speed"]
        for line in [[arm, f"{s['length']:,}", *_times(s, source.get(s["length"]))]]
    ]
    if not lines:
        return
    head = (
        *("arm", "tokens", "prefill (s)", "over the source's", "first token (s)"),
        *("decoding (ms a token)", "over the source's", "peak memory (MiB)", "over the source's"),
    )
    limit = ranking.result["constraints"]["max_slowdown"]
    yield Exhibit(
        "speed",
        "Speed and memory",
        "All arms in turns in one run, medians of the rounds; compare the ratios, not the numbers of other machines. "
        f"Memory is without the weights; training changes neither. {_BOLD if panels else ''}",
        [Table("Speed and memory", head, lines)],
        as_data_uri(lambda: pictures.speed(panels, ranking.styles, limit)) if panels else None,
        "Time of prefill and of decoding over the source's by length of the prompt, a line for each arm; numbers in "
        "the table below.",
        least_width=_LINES,
    )


def _bare(length: int, mean: float) -> Row:
    """A number without an interval."""
    return {"length": length, "mean": mean, "low": mean, "high": mean, "real": True}


def _times(timed: Row, source: Row | None) -> list[str]:
    if "skipped" in timed:
        return [f"skipped: {timed['skipped']}", *[""] * 6]
    peak, base = timed["peak_bytes"], (source or {}).get("peak_bytes")
    return [
        *(number(timed["prefill_s"]), number(timed["prefill_over"], ".2f"), number(timed["first_token_s"])),
        *(number(1000 * timed["decode_s"], ",.1f"), number(timed["decode_over"], ".2f")),
        number(None if peak is None else peak / 2**20, ",.1f"),
        number(None if peak is None or not base else peak / base, ".2f"),
    ]


def _panels(ranking: Ranking, drawn: Callable[[Row], Sequence[Row]]) -> dict[str, Series]:
    """Rows' measurements as they are ``drawn``, by budget of training; only what there is."""
    panels = {
        budget: {name: own for name in names if (own := drawn(ranking.rows[name]))}
        for budget, names in ranking.budgets.items()
    }
    return {budget: series for budget, series in panels.items() if series}
