"""What undoing a suspected mistake brings, end to end: in the running model, on text that did not suggest it.

Two figures, token by token. The loss of the next token is what users pay. The distance of what is predicted from what
the source predicts is what a retrofit lost, and knows no luck: a mistake may lower a loss, hardly ever the distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.evaluation.losses import Losses, difference, token_by_token
from rpb_retrofit.evaluation.nll import AT_ONCE
from rpb_retrofit.evaluation.statistics import LEVEL, Difference

LIKELIEST = 128
"""Tokens whose probabilities are compared one by one, the source's likeliest; all others count as one."""

CANDIDATES = 30
"""Mistakes that an examination undoes at most: the meanings of a table, orders, fits and temperatures. Each is tested
at 5% divided by as many (Bonferroni), so that in a healthy model the chance that any is called real is 5%."""


@dataclass(frozen=True)
class Scores:
    """One model's text: ``losses`` of the next tokens, ``distance``: KL from the source's predictions, token by token,
    None without a source."""

    losses: Losses
    distance: Losses | None


@dataclass(frozen=True)
class Predictions:
    """What a source predicts: the likeliest tokens of each position (windows, n, k), int32, and their logarithms."""

    token: Tensor
    log: Tensor


@dataclass(frozen=True)
class Effect:
    """The change that undoing something brings, in nats a token: of the ``loss``, and of the ``distance`` from the
    source's predictions, None without a source. ``lost``: the distance before, None without a source."""

    loss: Difference
    distance: Difference | None
    lost: float | None

    @classmethod
    def of(cls, before: Scores, after: Scores) -> Effect:
        """From the scores of the model as it is, and of the one in which something was undone."""
        near = None
        if before.distance is not None and after.distance is not None:
            near = difference(before.distance, after.distance)
        lost = None if before.distance is None else before.distance.mean
        return cls(difference(before.losses, after.losses), near, lost)

    @property
    def sure(self) -> bool:
        """Whether it brings something back for sure: the distance falls, or without a source the loss, at 5% over all
        candidates, and the loss does not rise."""
        main = self.loss if self.distance is None else self.distance
        return main.mean < 0 and main.p < LEVEL / CANDIDATES and not (self.loss.real and self.loss.mean > 0)

    @property
    def share(self) -> float | None:
        """Which part of what was lost it brings back; None without a source, which alone tells what was lost."""
        if self.distance is None or self.lost is None:
            return None
        return -self.distance.mean / self.lost if self.lost > 0 else 0.0

    def at_least(self, part: float) -> bool:
        """Whether it brings back so much of what was lost, as far as that is known."""
        return self.share is None or self.share >= part

    def __str__(self) -> str:
        evidence = f"undone, the loss changes by {self.loss.interval} nats a token"
        if self.share is None:
            return evidence
        return f"{evidence}, and the distance from the source's predictions by {-self.share:+.1%} of it"


def predictions(
    source: PreTrainedModel, documents: Sequence[Tensor], length: int, tokens: int, bos: int | None
) -> tuple[Losses, Predictions]:
    """A source's losses, and what it predicts, in windows of one length."""
    likeliest: list[tuple[Tensor, Tensor]] = []

    def keep(logits: Tensor) -> None:
        log = logits.float().log_softmax(-1)
        best = log.topk(min(LIKELIEST, log.shape[-1]), -1)
        likeliest.append((best.indices.int().cpu(), best.values.cpu()))

    with _with_logits(source, keep):
        losses = token_by_token(source, documents, length, tokens, bos, "source, ")
    return losses, Predictions(torch.stack([t for t, _ in likeliest]), torch.stack([x for _, x in likeliest]))


def scores(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    length: int,
    tokens: int,
    bos: int | None,
    predicted: Predictions | None,
    label: str = "",
) -> Scores:
    """A model's losses, and its distance from a source's predictions ``predicted`` on the same windows."""
    likeliest: list[Tensor] = []

    def compare(logits: Tensor) -> None:
        if predicted is not None:
            likeliest.append(_distance(predicted, len(likeliest), logits))

    with _with_logits(model, compare):
        losses = token_by_token(model, documents, length, tokens, bos, label)
    if predicted is None:
        return Scores(losses, None)
    return Scores(losses, Losses(losses.length, torch.stack(likeliest), losses.token, losses.document))


def _distance(predicted: Predictions, window: int, logits: Tensor) -> Tensor:
    """KL (n,), float32, of a model's ``logits`` (n, vocabulary) from the source's predictions of a window."""
    token, log = predicted.token[window].to(logits.device).long(), predicted.log[window].to(logits.device)
    parts = zip(logits.split(AT_ONCE), token.split(AT_ONCE), strict=True)  # float32 copies of all would not fit
    own = torch.cat([part.float().log_softmax(-1).gather(-1, at) for part, at in parts])
    rest, mine = (1 - x.exp().sum(-1, dtype=torch.double) for x in (log, own))
    rest, mine = rest.clamp(min=1e-7), mine.clamp(min=1e-7)
    return ((log.exp() * (log - own)).sum(-1) + rest * (rest / mine).log()).float().cpu()


@contextmanager
def _with_logits(model: Any, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, ``take`` gets the logits (n - 1, vocabulary) of every pass but those of the last token."""
    handle = model.register_forward_hook(lambda module, args, output: take(output.logits[0, :-1]))
    try:
        yield
    finally:
        handle.remove()
