"""What the arms make of their context: repeated spans, the order of neighbours, questions about a long text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.text_windows import TextWindows
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.context_use import make_inductions, make_local_orders
from rpb_retrofit.evaluation.retrieval import KINDS, make_items, measure
from rpb_retrofit.files.journal import Journal

DEPTHS = (0.1, 0.9)
"""Where in the context the answers lie, from its beginning to its end."""

Rows = list[dict[str, Any]]
"""A measurement, item by item."""


@dataclass
class TaskMeasurements:
    """How ``arms`` do on small tasks made of ``text``. ``tokenizer``: for questions in words, None for none of them."""

    arms: Arms
    text: TextWindows
    journal: Journal
    tokenizer: Any = None

    def inductions(self, role: str) -> Rows | None:
        """An arm's gain from a repeated span of random tokens, by distance; None without that arm."""
        model, text = self.arms.model(role), self.text
        if model is None:
            return None
        span = min(16, len(text.common))
        if span < 4:
            return []
        longest = text.within(max(text.lengths)) - span - 1
        distances = [d for d in (2 * span, 128, 512, 1024) if d <= longest]
        items = make_inductions(text.documents, distances, self._count, text.plan.seed, span, text.bos)
        return self.journal(f"induction-{role}", lambda: measure(model, items))

    def local_orders(self, role: str) -> Rows | None:
        """An arm's gain from the order of neighbours in its context; None without that arm."""
        model, text = self.arms.model(role), self.text
        if model is None:
            return None
        length = min(256, text.within(text.middle))
        items = make_local_orders(text.documents, [length], self._count, text.plan.seed, text.bos)
        return self.journal(f"order-{role}", lambda: measure(model, items))

    @property
    def _count(self) -> int:
        return max(6, 2 * self.text.plan.items)

    def questions(self, role: str) -> Rows | None:
        """An arm's answers to questions about a long context; None without that arm or a tokenizer. What does not
        fit is noted."""
        model, text = self.arms.model(role), self.text
        if model is None or self.tokenizer is None or not text.plan.items:
            return None
        items = []
        for kind in KINDS:
            for length in text.question_lengths:
                try:
                    items += make_items(
                        kind, self.tokenizer, text.documents, [length], DEPTHS, text.plan.items, text.plan.seed
                    )
                except DataError as error:
                    text.skipped[f"{kind} at {length}"] = str(error)
        try:
            return self.journal(f"questions-{role}", lambda: measure(model, items))
        except DataError as error:
            text.skipped[f"questions to the {role}"] = str(error)
            return None
