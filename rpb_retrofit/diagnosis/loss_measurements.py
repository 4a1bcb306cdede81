"""What the arms lose, token by token, and what one loses above another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE, Arms
from rpb_retrofit.diagnosis.text_windows import TextWindows
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.losses import Losses, difference, key_tokens, on_tokens, token_by_token
from rpb_retrofit.evaluation.nll import check_length
from rpb_retrofit.evaluation.speed import is_out_of_memory
from rpb_retrofit.evaluation.statistics import Difference
from rpb_retrofit.files.journal import Journal


@dataclass
class LossMeasurements:
    """The losses of ``arms`` on the windows of ``text``, in nats a token. What cannot be measured is in the text's
    ``skipped``."""

    arms: Arms
    text: TextWindows
    journal: Journal

    def __call__(self, role: str, length: int) -> Losses | None:
        """An arm's loss of every token, in windows of one length; None where it cannot take it, which is noted."""
        model = self.arms.model(role)
        name = f"loss-{role}-{length}"
        if model is None or name in self.text.skipped:
            return None
        documents, tokens, bos = self.text.documents, self.text.plan.tokens, self.text.bos
        try:
            check_length(model, length)
            return self.journal(name, lambda: token_by_token(model, documents, length, tokens, bos, f"{role}, "))
        except (DataError, MemoryError, RuntimeError) as error:
            if not isinstance(error, DataError) and not is_out_of_memory(error):
                raise
            self.text.skipped[name] = str(error).splitlines()[0]
            return None

    def cost(self, length: int, role: str = RETROFIT, above: str = SOURCE) -> Difference | None:
        """How much more one arm loses than another at a length; None where one was not measured."""
        a, b = self(above, length), self(role, length)
        return None if a is None or b is None else difference(a, b)

    @cached_property
    def key(self) -> Tensor | None:
        """The tokens that the source predicts well only with far context; None without two lengths of its losses."""
        short, long = self(SOURCE, self.text.lengths[0]), self(SOURCE, self.text.lengths[-1])
        return None if short is None or long is None or len(self.text.lengths) < 2 else key_tokens(short, long)

    def key_cost(self, role: str = RETROFIT, above: str = SOURCE) -> Difference | None:
        """How much more one arm loses than another on those, at the longest length; None where they are fewer than 8 or
        were not measured."""
        a, b = self(above, self.text.lengths[-1]), self(role, self.text.lengths[-1])
        if a is None or b is None or self.key is None or len(self.key) < 8:
            return None
        return difference(on_tokens(a, self.key), on_tokens(b, self.key))
