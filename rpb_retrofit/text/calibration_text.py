"""The text that tables are calibrated and polished on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.tables.calibrate import SHORTEST
from rpb_retrofit.text.reading import Text, read_text
from rpb_retrofit.text.repeats import MOST, with_repeats
from rpb_retrofit.text.tokens import special_ids
from rpb_retrofit.text.windows import spread_windows

LONGEST = 2048
"""Tokens of the longer windows of calibration, unless a length is asked for: the time grows with its square."""

SHARE = 4
"""The shorter windows have one token in so many of the longer ones', if that is no fewer than `SHORTEST`."""

POLISH = 512
"""Tokens of a step of polish."""

HELD_OUT = 8
"""One character in so many is held out where the retrofit is measured, from the end of the text."""

ENOUGH = 2**17
"""Characters of a text of which something can be held out: of a shorter one too little would be left to fit to."""


@dataclass(frozen=True)
class CalibrationText:
    """What tables are calibrated on: ``tokens`` of a text, half in windows of ``length``, half in shorter ones.

    ``repeats``: the share of the tokens that are planted as spans which come again: see `rpb_retrofit.text.repeats`;
    what is polished on stays as it is. ConfigError where it is none of 0 to `MOST`.
    """

    text: Text
    tokens: int = 8192
    length: int | None = None
    repeats: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.repeats <= MOST:
            raise ConfigError(f"--calibration-repeats {self.repeats:g}: give a share from 0 to {MOST:g}")

    @classmethod
    def of(cls, file: str | None, **cut: Any) -> CalibrationText:
        """A file's text, or by default Python's help texts, as `read_text` reads them."""
        return cls(read_text(file, "--calibration"), **cut)

    def parted(self) -> tuple[CalibrationText, Text]:
        """What to calibrate on, and what to measure on: all of it twice, where it is short."""
        if (characters := self.text.characters) < ENOUGH:
            return self, self.text
        first, rest = self.text.parted(characters - characters // HELD_OUT)
        return replace(self, text=first), rest

    def windows(self, tokenizer: Any, context: int | None) -> list[Tensor]:
        """The windows for a model that was trained on ``context`` tokens at once (None: not known).

        By default the longer ones are as long as that, but not longer than `LONGEST`. Short ones are there because a
        head attends otherwise at the beginning of a text than far inside it, and prompts come in all lengths.
        DataError where they would be longer than the context: the source has nothing to teach there.
        """
        if self.length is not None and context is not None and self.length > context:
            raise DataError(f"--calibration-length {self.length}: the source was made for {context} tokens at most")
        length = self.length or min(context or LONGEST, LONGEST)
        if length // SHARE < SHORTEST:
            return self._planted(tokenizer, spread_windows(tokenizer, self.text, length, self.tokens))
        longer = spread_windows(tokenizer, self.text, length, self.tokens // 2)
        shorter = spread_windows(tokenizer, self.text, length // SHARE, self.tokens // 2)
        return self._planted(tokenizer, [*longer, *shorter])

    def polishing(self, tokenizer: Any, context: int | None, steps: int) -> list[Tensor]:
        """The windows for so many steps of polish, and some to be held out; fewer where the text is short."""
        length = min(context or POLISH, POLISH)
        return spread_windows(tokenizer, self.text, length, length * (steps + max(1, steps // 10)))

    def _planted(self, tokenizer: Any, windows: list[Tensor]) -> list[Tensor]:
        return with_repeats(windows, self.repeats, special=special_ids(tokenizer)) if self.repeats else windows
