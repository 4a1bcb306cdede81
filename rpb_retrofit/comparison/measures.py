"""What is measured of an arm: the loss of every token by length, what it finds in its context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.context_use import Induction, make_inductions
from rpb_retrofit.evaluation.losses import Losses, token_by_token
from rpb_retrofit.evaluation.retrieval import Item, make_items, measure
from rpb_retrofit.evaluation.speed import is_out_of_memory

DEPTHS = (0.1, 0.5, 0.9)
"""Where in the context an answer stands."""

SPAN = 16
"""Tokens of a span that is repeated."""


@dataclass(frozen=True)
class ComparisonPlan:
    """What is measured. All lengths are in tokens and ascending.

    ``target``: the length that the choice is for. ``lengths``: of the windows that losses are taken in, the target
    among them; ``tokens``: of text, the same ones at every length. ``asked``: the lengths at which ``items`` questions
    of each of ``kinds``, at each depth, are asked, and twice as many repeated spans. ``timed``: the lengths of prompts
    that are timed, in so many ``rounds``. ``seed``: of the questions. ``beyond``: the position from which on the loss
    at the target counts; None: the context.
    """

    target: int
    lengths: tuple[int, ...]
    tokens: int = 16384
    asked: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ("passkey",)
    items: int = 2
    timed: tuple[int, ...] = ()
    rounds: int = 3
    seed: int = 0
    beyond: int | None = None


@dataclass(frozen=True)
class Measured:
    """What one model did: losses by length, rows of `retrieval.measure`, and what it could not do, and why."""

    losses: dict[int, Losses]
    questions: list[dict[str, Any]]
    spans: list[dict[str, Any]]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """The text and the questions, the same for every arm. ``bos`` begins every window."""

    plan: ComparisonPlan
    documents: Sequence[Tensor]
    bos: int | None
    questions: Sequence[Item]
    spans: Sequence[Induction]

    @classmethod
    def make(
        cls, plan: ComparisonPlan, documents: Sequence[Tensor], bos: int | None, tokenizer: Any, skipped: dict[str, str]
    ) -> Benchmark:
        """All of them; a question that does not fit its length is noted in ``skipped``. Without a tokenizer none."""
        questions: list[Item] = []
        for kind in plan.kinds if plan.items and tokenizer is not None else ():
            for length in plan.asked:
                try:
                    questions += make_items(kind, tokenizer, documents, [length], DEPTHS, plan.items, plan.seed)
                except DataError as error:
                    skipped[f"{kind} at {length}"] = str(error)
        spans: list[Induction] = []
        distances = [n - SPAN - 1 for n in plan.asked if n > 2 * SPAN]
        if distances and plan.items and len(torch.cat(list(documents)).unique()) >= SPAN:
            try:
                spans = make_inductions(documents, distances, 2 * plan.items, plan.seed, SPAN, bos)
            except DataError as error:
                skipped["repeated spans"] = str(error)
        return cls(plan, documents, bos, questions, spans)

    def measure(self, model: PreTrainedModel, label: str) -> Measured:
        """All of it on one model. A length that it cannot take, or has no memory for, is noted in ``failed``."""
        failed: dict[str, str] = {}

        def tried(what: str, take: Callable[[], Any]) -> Any:
            try:
                return take()
            except (DataError, MemoryError, RuntimeError) as error:
                if not isinstance(error, DataError) and not is_out_of_memory(error):
                    raise
                failed[what] = str(error).splitlines()[0]
                return None

        losses = {}
        for length in self.plan.lengths:
            score = partial(token_by_token, model, self.documents, length, self.plan.tokens, self.bos, f"{label}, ")
            scored = tried(str(length), score)
            if scored is not None and not scored.losses.isfinite().all():
                failed[str(length)] = f"{int((~scored.losses.isfinite()).sum())} losses are not finite"
            elif scored is not None:
                losses[length] = scored
        questions = tried("questions", lambda: measure(model, self.questions)) if self.questions else []
        spans = tried("repeated spans", lambda: measure(model, self.spans)) if self.spans else []
        return Measured(losses, questions or [], spans or [], failed)
