"""The text of a diagnosis: its windows, and the lengths at which models are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.losses import cut_text


@dataclass
class TextWindows:
    """Windows of ``documents``, each (n,) int64 token ids, for ``arms`` to read; ``bos`` begins every window.

    ``skipped``: what the text is too short for, and why.
    """

    arms: Arms
    documents: Sequence[Tensor]
    bos: int | None
    plan: DiagnosisPlan
    skipped: dict[str, str]

    def window(self, length: int) -> Tensor:
        """The first window (length,) of the text."""
        return self.windows(length, 1)[0]

    def windows(self, length: int, count: int) -> list[Tensor]:
        """``count`` windows (length,) of the text, or as many as there are."""
        return cut_text(self.documents, length, count * length, self.bos)

    @cached_property
    def common(self) -> Tensor:
        """The tokens that occur in the text."""
        return torch.cat(list(self.documents)).unique()

    @cached_property
    def lengths(self) -> list[int]:
        """The plan's lengths that the text fills; what it does not is in ``skipped``. DataError where it fills none."""
        longest = max(map(len, self.documents))
        filled = []
        for length in self.plan.lengths:
            if length > min(longest, self.plan.tokens):
                self.skipped[f"length {length}"] = (
                    f"the text's longest document has {longest} tokens, and {self.plan.tokens} (--tokens) are read"
                )
            else:
                filled.append(length)
        if not filled:
            raise DataError(
                f"the shortest length is {min(self.plan.lengths)}; the text's longest document has {longest} tokens, "
                f"and {self.plan.tokens} tokens are read: give longer text, shorter lengths or more tokens"
            )
        return filled

    def within(self, length: int) -> int:
        """A length, or what of it the text fills and all models can take."""
        return min(length, max(self.lengths), self.arms.position_limit or length)

    @property
    def middle(self) -> int:
        """The length that is nearest to 512 tokens, of those that all models can take."""
        return min(
            (n for n in self.lengths if self.within(n) == n), key=lambda n: abs(n - 512), default=self.lengths[0]
        )

    @cached_property
    def question_lengths(self) -> list[int]:
        """The lengths at which questions are asked: a short and a middle one, as far as they are among the lengths."""
        return sorted({n for n in self.lengths if 256 <= self.within(n) == n <= 1024}) or [self.within(self.middle)]

    @property
    def held_out(self) -> list[Tensor]:
        """Two windows that suggest what may be wrong: behind the text on which what is undone is scored, where there is
        enough of it."""
        length = self.within(512)
        windows = cut_text(self.documents, length, self.plan.tokens + 2 * length, self.bos)
        if (len(windows) - 2) * length < max(self.plan.probed, self.middle):
            self.skipped["text of its own to confirm a cause on"] = (
                f"the text has {sum(map(len, self.documents))} tokens: what suggests a cause and what confirms it "
                "overlap; give more"
            )
        return windows[-2:]
