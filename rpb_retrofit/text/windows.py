"""Windows of token ids, cut from a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.errors import DataError
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.tokens import special_tokens, tokenise


def spread_windows(tokenizer: Any, text: Text, length: int, tokens: int) -> list[Tensor]:
    """Windows (length,) of token ids, ``tokens`` together, spread evenly over the text and never across documents.

    Each stands between the special tokens that the tokenizer adds. Raises DataError where the text has too few tokens
    for one window.
    """
    before, after = special_tokens(tokenizer)
    room = length - len(before) - len(after)
    documents = tokenise(tokenizer, text.documents)
    longest = max(map(len, documents))
    if longest < room:
        raise DataError(
            f"{text.name}: its longest document has {longest} tokens, too few for a window of {length}: give longer "
            "text or shorter windows"
        )
    starts = [(i, start) for i, ids in enumerate(documents) for start in range(0, len(ids) - room + 1, room)]
    count = max(1, min(len(starts), tokens // length))
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    return [torch.cat([before, documents[i][start : start + room], after]) for i, start in chosen]
