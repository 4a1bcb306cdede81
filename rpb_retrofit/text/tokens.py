"""Documents as token ids, and what a tokenizer puts around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.errors import DataError


def tokenise(tokenizer: Any, documents: Sequence[str]) -> list[Tensor]:
    """Documents as token ids, without special tokens."""
    if not documents:
        return []
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids) for ids in encoded]


def bos_policy(tokenizer: Any, policy: str) -> int | None:
    """The id that begins every window: ``always``, ``never``, or ``auto``: where the tokenizer itself adds it."""
    bos = tokenizer.bos_token_id
    if policy == "never" or (policy == "auto" and tokenizer("a")["input_ids"][:1] != [bos]):
        return None
    if bos is None:
        raise DataError("--bos always: this tokenizer has no beginning-of-sequence token")
    return bos


def special_ids(tokenizer: Any) -> list[int]:
    """All tokens that are no text: those with a role, those that are only marked so, and what is put around a text."""
    marked = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    around = torch.cat(special_tokens(tokenizer)).tolist()
    return sorted({*tokenizer.all_special_ids, *marked, *around})


def special_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before and after a text: BOS, CLS, SEP, ..."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    extra = len(whole) - len(plain)
    start = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return torch.tensor(whole[:start], dtype=torch.long), torch.tensor(whole[start + len(plain) :], dtype=torch.long)
