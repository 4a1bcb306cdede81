"""Questions about long contexts for the tests, and models that answer as they are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.evaluation.retrieval import Item, make_items
from rpb_retrofit.text.tokens import tokenise
from tests.support.tokenizers import tokenizer_of_text
from tests.support.training_cases import PROSE

LENGTH = 640
"""Room for every kind in a vocabulary of 512."""

SURE = 30.0
"""A logit beside which all others are nothing."""


@cache
def filler(name: str) -> list[Tensor]:
    """The prose as two documents."""
    return tokenise(tokenizer_of_text(name), [PROSE[:20_000], PROSE[20_000:]])


def items(kind: str, name: str, **changes: Any) -> list[Item]:
    asked: dict[str, Any] = {"lengths": [LENGTH], "depths": [0.5], "count": 2, **changes}
    return make_items(kind, tokenizer_of_text(name), filler(name), **asked)


def spelled(name: str, ids: Tensor) -> str:
    return tokenizer_of_text(name).decode(ids, clean_up_tokenization_spaces=False)


class Stub(torch.nn.Module):
    """What the measurements ask of a model; its logits are `predict` of its token ids (n,)."""

    def __init__(self, vocabulary: int, predict: Callable[[Tensor], Tensor], longest: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=longest)
        self.name_or_path = "stub"
        self.position_table = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary, self.predict, self.passes = vocabulary, predict, 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not torch.is_grad_enabled()
        self.passes += 1
        logits = self.predict(input_ids[0])
        assert logits.shape == (input_ids.shape[1], self.vocabulary)
        return SimpleNamespace(logits=logits[None])


def uniform(vocabulary: int) -> Any:
    return Stub(vocabulary, lambda ids: torch.zeros(len(ids), vocabulary))
