"""What comes back when something is undone in a running model, each change scored once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE, Arms
from rpb_retrofit.diagnosis.effect import Effect, Predictions, Scores, predictions, scores
from rpb_retrofit.diagnosis.failures import Failures
from rpb_retrofit.diagnosis.intervention import Change, changed
from rpb_retrofit.diagnosis.text_windows import TextWindows
from rpb_retrofit.evaluation.losses import Losses
from rpb_retrofit.files.journal import Journal
from rpb_retrofit.runtime.anatomy import Anatomy

Within = Callable[[], AbstractContextManager[Any]]
"""Within what it gives, a model is changed."""

AS_IT_IS = "as-it-is"
"""What a change that changes nothing is called."""


@dataclass
class Undoing:
    """Changes of ``arms``, scored on ``text``. A change is measured once under its name, which a file can have."""

    arms: Arms
    text: TextWindows
    journal: Journal
    failures: Failures

    def effect(self, name: str, undo: Within, length: int | None = None) -> Effect:
        """What the retrofit gets back when something is undone, in windows of a length, by default the middle one."""
        return self.between((AS_IT_IS, nullcontext), (name, undo), length)

    def attempt(self, name: str, undo: Within, length: int | None = None) -> Effect | None:
        """The same; None where that ends in an error, which is noted, and of what predicts no next token."""
        if not self.arms.causal:
            return None
        return self.failures.attempt(f"what undoing {name} brings", lambda: self.effect(name, undo, length), None)

    def between(self, first: tuple[str, Within], second: tuple[str, Within], length: int | None = None) -> Effect:
        """What a second change of the retrofit, by its name, brings over a first one."""
        length = length or self.text.middle
        return Effect.of(self._changed(RETROFIT, *first, length), self._changed(RETROFIT, *second, length))

    def replaced(self, name: str, model: PreTrainedModel) -> Effect:
        """What the retrofit gets back when ``model`` runs in its place."""
        length = self.text.middle
        return Effect.of(
            self._changed(RETROFIT, AS_IT_IS, nullcontext, length), self._scores(f"{name}, ", model, length)
        )

    def with_change(self, change: Change, role: str = RETROFIT) -> Within:
        """Within what it gives, an arm's attention runs with a change."""
        return partial(changed, Anatomy.of(dict(self.arms)[role]), change)

    def losses(self, role: str, name: str, change: Change, length: int) -> Losses:
        """An arm's losses with a change of its attention, on the text that changes are scored on."""
        if role == SOURCE and change == Change():
            return self._predictions(length)[0]
        return self._changed(role, name, self.with_change(change, role), length).losses

    def _changed(self, role: str, name: str, within: Within, length: int) -> Scores:
        def score() -> Scores:
            with within():
                return self._scores(f"{role}, {name}, ", dict(self.arms)[role], length)

        return self.journal(f"changed-{role}-{name}-{length}", score)

    def _scores(self, label: str, model: PreTrainedModel, length: int) -> Scores:
        predicted = None if self.arms.source is None else self._predictions(length)[1]
        return scores(model, self.text.documents, length, self._tokens(length), self.text.bos, predicted, label)

    def _predictions(self, length: int) -> tuple[Losses, Predictions]:
        source, text = self.arms.source, self.text
        assert source is not None
        return self.journal(
            f"predictions-source-{length}",
            lambda: predictions(source, text.documents, length, self._tokens(length), text.bos),
        )

    def _tokens(self, length: int) -> int:
        return max(self.text.plan.probed, length)
