"""Positions that are not the index, and texts that come in parts with theirs."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

RESTARTED = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
"""(2, 12): two rows of documents in a row, whose positions begin again."""


def by_steps(model: PreTrainedModel, ids: Tensor, positions: Tensor, cache: Cache | None, cuts: list[int]) -> Tensor:
    """The logits of a text that comes in parts, each with its positions, which the model tells apart by a mask."""
    steps, start = list[Tensor](), 0
    for end in cuts:
        out = model(
            ids[:, start:end],
            attention_mask=torch.ones_like(ids[:, :end]),
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        steps, start, cache = [*steps, out.logits], end, out.past_key_values
    return torch.cat(steps, 1)
