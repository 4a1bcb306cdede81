"""Who is who on the page of a comparison: their order, the choice, and who is drawn boldly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rpb_retrofit.comparison.candidates import Candidate, Figures
from rpb_retrofit.comparison.figures import table
from rpb_retrofit.evaluation.statistics import Difference
from rpb_retrofit.pages.drawing import LINE_STYLES, LineStyle

THIN = LineStyle("#6b6b6b", "-", "o", thin=True)
"""How an arm is drawn that is neither the source nor the answer nor among the best of the rest."""


@dataclass(frozen=True)
class Ranking:
    """The rows of a result, as `rpb_retrofit.comparison.result` makes it, and what the recommendation made of them."""

    result: Mapping[str, Any]

    @cached_property
    def figures(self) -> Figures:
        """What the recommendation was made from."""
        return table(self.result)

    @cached_property
    def rows(self) -> Mapping[str, Mapping[str, Any]]:
        """The rows by name, the lowest loss at the target first, those without one last."""
        rows = {row["id"]: row for row in self.result["rows"]}
        order = sorted(self.figures.candidates, key=lambda c: c.loss if math.isfinite(c.loss) else math.inf)
        return {candidate.name: rows[candidate.name] for candidate in order}

    @cached_property
    def ranked(self) -> list[Candidate]:
        """Who has a loss at the target, the lowest first."""
        by_name = {candidate.name: candidate for candidate in self.figures.candidates}
        return [by_name[name] for name in self.rows if math.isfinite(by_name[name].loss)]

    @property
    def choice(self) -> str | None:
        """The name of the row to take, if there is one."""
        return self.result["recommendation"]["choice"]

    @property
    def runner_up(self) -> str | None:
        """The name of the row to take if there were no choice."""
        return self.result["recommendation"]["runner_up"]

    @property
    def rejected(self) -> Mapping[str, str]:
        """Who cannot be taken, and why."""
        return self.result["recommendation"]["rejected"]

    @cached_property
    def anchor(self) -> Candidate | None:
        """Who the others are held against: the choice, or else who has the lowest loss; None where nobody has one."""
        chosen = [candidate for candidate in self.ranked if candidate.name == self.choice]
        return next(iter([*chosen, *self.ranked]), None)

    def difference(self, a: Candidate, b: Candidate) -> Difference | None:
        """How much more ``b`` loses at the target than ``a``; None where they were not compared."""
        try:
            return self.figures.difference(a, b)
        except KeyError:
            return None

    def behind(self, candidate: Candidate) -> Difference | None:
        """How much more a candidate loses at the target than the anchor; None for itself, or where it is not known."""
        if self.anchor is None or candidate is self.anchor:
            return None
        return self.difference(self.anchor, candidate)

    def titled(self, name: str) -> str:
        """A row's name, with what it has become."""
        role = {self.runner_up: "runner-up", self.choice: "choice"}.get(name)
        return f"{name}, {role}" if role else name

    @cached_property
    def styles(self) -> Mapping[str, LineStyle]:
        """How rows are drawn, trained or not: the source, the answer and the best of the rest boldly, in this order."""
        named = [self.result["rows"][0]["id"], self.choice, self.runner_up, *(c.name for c in self.ranked)]
        arms = dict.fromkeys(self.rows[name]["arm"] for name in named if name in self.rows)
        bold = dict(zip(arms, LINE_STYLES, strict=False))
        return {name: bold.get(row["arm"], THIN) for name, row in self.rows.items()}

    @cached_property
    def budgets(self) -> Mapping[str, list[str]]:
        """Names of rows by how much they were trained."""
        by_tokens: dict[int, list[str]] = {}
        for name, row in self.rows.items():
            by_tokens.setdefault(row["tokens"], []).append(name)
        return {f"trained on {n:,} tokens" if n else "untrained": by_tokens[n] for n in sorted(by_tokens)}
