"""What a retrofit keeps of its source, in a minute: loss by length, and what spans that come again still gain.

The loss alone hides most of the damage: text hardly rewards attention to what stands far above, so a model that no
longer finds it loses next to nothing. The two belong together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.convert import Conversion, retrofit_checkpoint
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.context_use import SPAN, induction_gains
from rpb_retrofit.evaluation.nll import Windows, check_ids, nll_at_length
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.tables.calibrate import SHORTEST
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.tokens import bos_policy, tokenise

LENGTHS = (512, 2048)
"""Tokens of the windows that are scored, as far as the context and the text hold them."""

TOKENS = 4096
"""Tokens that are scored at each length."""

SPANS = {128: 4, 512: 4, 2048: 2}
"""Spans that are measured, by the tokens from where one stands to where it comes again; likewise."""


@dataclass(frozen=True)
class Measures:
    """Of one model, in nats a token: the mean loss by the length of windows, and the mean gain of a repeated span by
    distance, lengths and distances in tokens."""

    losses: dict[int, float]
    gains: dict[int, float]


def measures(text: Text, model: PreTrainedModel, tokenizer: Any) -> Measures:
    """Of a model that predicts next tokens, inside the context that it was trained on.

    DataError where it predicts none, or the text is too short to tell. Lengths that do not fit are left out; where none
    does, the longest that fits is taken.
    """
    anatomy = Anatomy.of(model)
    if model.get_output_embeddings() is None or not all(anatomy.facts(name).causal for name in anatomy.attentions):
        raise DataError(f"{type(model).__name__} does not predict next tokens")
    documents, bos = tokenise(tokenizer, text.documents), bos_policy(tokenizer, "auto")
    check_ids(model, documents)
    fits = min(anatomy.context or LENGTHS[-1], max(map(len, documents)))
    if fits < SHORTEST:
        raise DataError(f"{text.name} and the model's context hold no window of {SHORTEST} tokens")
    lengths = [length for length in LENGTHS if length <= fits] or [fits]
    spans = {distance: count for distance, count in SPANS.items() if distance + 2 * SPAN < fits}
    with evaluating(model):
        losses = {n: nll_at_length(model, documents, Windows(n, n, bos), TOKENS).nll for n in lengths}
        gains = induction_gains(model, documents, spans, bos=bos)
    return Measures(losses, {distance: fmean(each) for distance, each in gains.items()})


@dataclass(frozen=True)
class Keeping:
    """Measures of a source and of its retrofit, on the same ``text``; ``seen``: tables were fitted to that text."""

    text: str
    seen: bool
    source: Measures
    retrofit: Measures

    def __str__(self) -> str:
        losses = [
            f"{before:.3f} -> {after:.3f} ({after - before:+.3f}) at {n:,} tokens"
            for n, before, after in _beside(self.source.losses, self.retrofit.losses)
        ]
        gains = [
            f"{before:.1f} -> {after:.1f}" + (f" ({after / before:.0%})" if before > 0 else "") + f" at {n:,} tokens"
            for n, before, after in _beside(self.source.gains, self.retrofit.gains)
        ]
        which = ", which it was calibrated on: expect more elsewhere" if self.seen else ", which nothing was fitted to"
        lines = [f"measured on {self.text}{which}; source -> retrofit:", f"loss in nats a token: {'; '.join(losses)}"]
        if gains:
            lines.append(f"what a span that comes again gains, in nats a token: {'; '.join(gains)}")
        return "\n".join(lines)


def retrofit_measured(
    source: str, out: str | Path, config: RetrofitConfig, calibration: CalibrationText, *, link: bool = False
) -> tuple[Conversion, Keeping | str]:
    """`retrofit_checkpoint` on text, and what the retrofit keeps; in words, why that cannot be measured.

    The end of the text is held out for it, where the text is not short.
    """
    fitted, held_out = calibration.parted()

    def measure(model: PreTrainedModel, tokenizer: Any) -> Measures | str:
        try:
            return measures(held_out, model, tokenizer)
        except DataError as error:
            return f"not measured: {error}"

    done = retrofit_checkpoint(source, out, config, link=link, calibration=fitted, measure=measure)
    assert done.measured is not None, "the weights were loaded, as text is read with them"
    before, after = done.measured
    return done, before if isinstance(before, str) else Keeping(held_out.name, fitted.text is held_out, before, after)


def _beside(source: Mapping[int, float], retrofit: Mapping[int, float]) -> Iterator[tuple[int, float, float]]:
    return ((at, before, retrofit[at]) for at, before in source.items())
