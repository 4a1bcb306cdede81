"""A comparison's figures as plain numbers, and as the table that a recommendation is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from rpb_retrofit.comparison.candidates import Candidate, Figures
from rpb_retrofit.comparison.measures import Measured
from rpb_retrofit.comparison.run import SOURCE, Comparison, Row
from rpb_retrofit.evaluation.losses import Losses, difference
from rpb_retrofit.evaluation.retrieval import cells
from rpb_retrofit.evaluation.speed import SpeedResult
from rpb_retrofit.evaluation.statistics import Difference, controlled, paired

JSON = dict[str, Any]
Part = tuple[int, int, int]
"""Tokens of a window, and the first and last position in it that count."""


def figures(comparison: Comparison) -> JSON:
    """``rows``, ``pairs``, ``context`` and ``target``; all differences of a kind are controlled together."""
    return _Figures(comparison).rows()


class _Figures:
    """What is asked of the measurements."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.context, self.plan = comparison, comparison.context, comparison.plan
        target, within = self.plan.target, [n for n in self.plan.lengths if n <= self.context]
        self.inside: Part | None = (within[-1], 1, within[-1] - 1) if within else None
        first = self.plan.beyond or (self.context if target > self.context else 1)
        self.beyond: Part = (target, first, target - 1)
        self.by_name = {row.name: row for row in comparison.rows}

    def rows(self) -> JSON:
        rows = self.comparison.rows
        lengths: list[Part] = [(n, 1, n - 1) for n in self.plan.lengths]
        parts = {*lengths, self.beyond, *([self.inside] if self.inside else [])}
        asked = [(row, part) for part in sorted(parts) for row in rows if self._reference(row) is not None]
        gaps = [(row, part, gap) for row, part in asked if (gap := self._gap(self._reference(row), row, part))]
        adjusted = controlled([gap for *_, gap in gaps])
        above = {(row.name, part): gap for (row, part, _), gap in zip(gaps, adjusted, strict=True)}
        return {
            "context": self.context,
            "target": self.plan.target,
            "rows": [self._row(row, lengths, above) for row in rows],
            "pairs": self._pairs(),
        }

    def _reference(self, row: Row) -> Row | None:
        """What a row is held against: the source, trained where the row is; None for that itself."""
        reference = self.by_name.get(f"{SOURCE} healed" if row.tokens else SOURCE)
        return None if reference is row else reference

    def _gap(self, a: Row | None, b: Row, part: Part) -> Difference | None:
        """How much more ``b`` loses than ``a``; None where one was not measured."""
        reference = [] if a is None else _losses(a.measured, part)
        own = _losses(b.measured, part)
        return over_seeds(reference, own) if reference and own else None

    def _row(self, row: Row, lengths: Sequence[Part], above: Mapping[tuple[str, Part], Difference]) -> JSON:
        def at(part: Part) -> JSON | None:
            losses, gap = _losses(row.measured, part), above.get((row.name, part))
            if not losses:
                return None
            return {
                "length": part[0],
                "mean": fmean(one.mean for one in losses),
                "above": None if gap is None else as_json(gap),
            }

        beyond = at(self.beyond)
        return {
            "id": row.name,
            "arm": row.arm,
            "about": row.about,
            "how": row.made.how,
            "tokens": row.tokens,
            "rate": row.rate,
            "seeds": len(row.measured),
            "losses": [loss for part in lengths if (loss := at(part)) is not None],
            "inside": None if self.inside is None else at(self.inside),
            "beyond": None if beyond is None else {**beyond, "first": self.beyond[1]},
            "by_position": self._by_position(row),
            "retrieval": [asdict(cell) for cell in cells([q for m in row.measured for q in m.questions])],
            "induction": _spans(row.measured),
            "speed": self._speed(row.arm),
            "cost": {"calibration_s": row.made.seconds, "training_s": row.seconds, "tokens": row.tokens},
            "broken": self._broken(row),
        }

    def _broken(self, row: Row) -> str | None:
        """Why a row cannot be recommended: it was not measured at the target, or not inside, where others were."""
        for part in (self.beyond, self.inside):
            if part is not None and not _losses(row.measured, part):
                failed = next(
                    (m.failed[str(part[0])] for m in row.measured if str(part[0]) in m.failed), "not measured"
                )
                return f"at {part[0]} tokens: {failed}"
        return None

    def _by_position(self, row: Row) -> list[JSON]:
        """Loss by position at the target, in bins of powers of two, with 95% bands over stretches of text."""
        losses = [m.losses[self.plan.target] for m in row.measured if self.plan.target in m.losses]
        bins, first = [], 1
        while losses and first < self.plan.target:
            last = min(2 * first - 1, self.plan.target - 1)
            parts = [one.at(first, last) for one in losses]
            mean = torch.stack([part.losses.double() for part in parts]).mean(0)
            band = paired(mean.flatten().tolist(), parts[0].clusters().flatten().tolist())
            bins.append(
                {
                    **{"length": self.plan.target, "first": first, "last": last},
                    **{"nll": band.mean, "low": band.low, "high": band.high},
                }
            )
            first *= 2
        return bins

    def _speed(self, arm: str) -> list[JSON]:
        """An arm's times, and over the source's, round by round."""
        rows: list[JSON] = []
        of_source = {result.length: result for result in self.comparison.timed.get(SOURCE, ())}
        for result in self.comparison.timed.get(arm, ()):
            source = of_source.get(result.length)
            if not isinstance(result, SpeedResult):
                rows.append({"length": result.length, "skipped": result.reason})
                continue
            prefill = decode = None
            if isinstance(source, SpeedResult):
                prefill = result.prefill_s.over(source.prefill_s)
                decode = result.decode_s_per_token.over(source.decode_s_per_token)
            rows.append(
                {
                    "length": result.length,
                    "prefill_s": result.prefill_s.median,
                    "first_token_s": result.first_token_s.median,
                    "decode_s": result.decode_s_per_token.median,
                    "prefill_over": prefill,
                    "decode_over": decode,
                    "peak_bytes": result.peak_bytes,
                }
            )
        return rows

    def _pairs(self) -> list[JSON]:
        """Every pair of rows, at the target and inside."""
        gaps = []
        for at, part in (("target", self.beyond), ("inside", self.inside)):
            for a, b in combinations(self.comparison.rows, 2):
                if part is not None and (gap := self._gap(a, b, part)) is not None:
                    gaps.append((a.name, b.name, at, gap))
        adjusted = controlled([gap for *_, gap in gaps])
        return [{"a": a, "b": b, "at": at, **as_json(gap)} for (a, b, at, _), gap in zip(gaps, adjusted, strict=True)]


def table(result: Mapping[str, Any]) -> Figures:
    """What a recommendation is made from, of what `figures` gave."""
    rows = result["rows"]
    peaks = _peaks(rows[0])
    candidates = []
    for row in rows:
        timed = [speed for speed in row["speed"] if "skipped" not in speed and speed["prefill_over"] is not None]
        items = sum(cell["items"] for cell in row["retrieval"])
        shared = sorted(peaks.keys() & (own := _peaks(row)).keys())
        candidates.append(
            Candidate(
                name=row["id"],
                loss=row["beyond"]["mean"] if row["beyond"] else float("inf"),
                kept=as_difference(row["inside"]["above"]) if row["inside"] and row["inside"]["above"] else None,
                slowdown=max(timed[-1]["prefill_over"], timed[-1]["decode_over"]) if timed else None,
                tokens=row["tokens"],
                seconds=row["cost"]["calibration_s"] + row["cost"]["training_s"],
                broken=row["broken"],
                retrieval=sum(cell["correct"] * cell["items"] for cell in row["retrieval"]) / items if items else None,
                memory=own[shared[-1]] / peaks[shared[-1]] if shared and peaks[shared[-1]] else None,
            )
        )
    differences = {(p["a"], p["b"]): as_difference(p) for p in result["pairs"] if p["at"] == "target"}
    return Figures(result["target"], tuple(candidates), differences)


def _peaks(row: Mapping[str, Any]) -> dict[int, int]:
    """Peak memory by length, where it was measured."""
    return {s["length"]: s["peak_bytes"] for s in row["speed"] if s.get("peak_bytes") is not None}


def as_json(difference: Difference) -> JSON:
    """A difference, and whether it is real."""
    return {**asdict(difference), "real": difference.real}


def as_difference(numbers: Mapping[str, Any]) -> Difference:
    """The inverse of `as_json`."""
    return Difference(**{name: numbers[name] for name in Difference.__dataclass_fields__})


def _losses(measured: Sequence[Measured], part: Part) -> list[Losses]:
    """The losses of every seed at the positions of a part; none where a seed has none."""
    length, first, last = part
    losses = [m.losses[length].at(first, last) for m in measured if length in m.losses]
    return losses if len(losses) == len(measured) else []


def over_seeds(a: Sequence[Losses], b: Sequence[Losses]) -> Difference:
    """How much more ``b`` loses than ``a`` on the same tokens, over one or several runs of each.

    The mean of the seeds is uncertain by the text, and by the seeds: the wider of the two intervals counts. An
    untrained model is the same for every seed.
    """
    runs = max(len(a), len(b))
    a, b = ([one[i % len(one)] for i in range(runs)] for one in (a, b))
    by_text = difference(_mean(a), _mean(b))
    if runs == 1:
        return by_text
    by_seed = paired([y.mean - x.mean for x, y in zip(a, b, strict=True)], range(runs))
    return max(by_text, by_seed, key=lambda over: over.high - over.low)


def _mean(runs: Sequence[Losses]) -> Losses:
    first = runs[0]
    return Losses(first.length, torch.stack([run.losses for run in runs]).mean(0), first.token, first.document)


def _spans(measured: Sequence[Measured]) -> list[JSON]:
    """What a repeated span gains by its distance, with its interval over the spans."""
    rows = [row for one in measured for row in one.spans]
    spans = []
    for distance in sorted({row["distance"] for row in rows}):
        here = [row for row in rows if row["distance"] == distance]
        gain = paired([row["gain"] for row in here], [row["number"] for row in here])
        spans.append({"distance": distance, **as_json(gain)})
    return spans
