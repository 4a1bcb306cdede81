"""The loss of every token, kept apart, so that two models can be compared token by token on one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.nll import LengthResult, Windows, check_length, position_bins, token_losses
from rpb_retrofit.evaluation.statistics import Difference, paired

STRETCH = 128
"""Tokens in a row that count as one cluster, where there are too few documents to be the clusters."""

FEWEST_DOCUMENTS = 5
"""Documents from which on they are the clusters."""


@dataclass(frozen=True)
class Losses:
    """Losses (windows, length - 1), float32, in nats, of the tokens 1 .. length - 1 of windows that do not overlap.

    ``token`` (windows, length - 1), int64: which token of the whole text each is; ``document`` (windows,): its number.
    """

    length: int
    losses: Tensor
    token: Tensor
    document: Tensor

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.losses.double().mean().item()

    def by_length(self) -> LengthResult:
        """The same, by position in the window only."""
        windows = len(self.losses)
        total = torch.cat([torch.zeros(1, dtype=torch.double), self.losses.double().sum(0)])
        count = torch.full((self.length,), windows)
        return LengthResult(self.length, self.mean, self.losses.numel(), windows, position_bins(total, count))

    def at(self, first: int, last: int) -> Losses:
        """Only the tokens at the positions ``first`` to ``last`` of the window."""
        part = slice(first - 1, last)
        return Losses(self.length, self.losses[:, part], self.token[:, part], self.document)

    def clusters(self) -> Tensor:
        """(windows, positions), int64: documents, or where there are few, stretches of them."""
        if len(self.document.unique()) >= FEWEST_DOCUMENTS:
            return self.document[:, None].expand_as(self.token)
        return self.token // STRETCH


def cut_text(documents: Sequence[Tensor], length: int, tokens: int, bos: int | None) -> list[Tensor]:
    """Windows (length,) of the first ``tokens`` tokens of text; DataError where none fits."""
    cut = [ids for ids, _ in Windows(length, length - (bos is not None), bos).cut(documents, tokens)]
    if not cut:
        longest = max(map(len, documents))
        raise DataError(
            f"length {length}: no window fits (longest document {longest} tokens, budget {tokens} tokens): give longer "
            "text, a shorter length, or more tokens"
        )
    return cut


@torch.no_grad()
def token_by_token(
    model: PreTrainedModel, documents: Sequence[Tensor], length: int, tokens: int, bos: int | None, label: str = ""
) -> Losses:
    """Score up to ``tokens`` tokens of text in windows of ``length``, none of which overlap.

    DataError where no window fits or the model cannot take one; what PyTorch raises where memory does not suffice.
    """
    check_length(model, length)
    windows = Windows(length, length - (bos is not None), bos)
    losses, token, document = [], [], []
    room, start = windows.stride, 0
    starts: list[tuple[int, int]] = []
    for number, ids in enumerate(documents):
        starts += [(number, start + first) for first in range(0, len(ids) - room + 1, room)]
        start += len(ids)
    cut = cut_text(documents, length, tokens, bos)
    for ids, (number, begin) in zip(
        tqdm(cut, desc=f"{label}{length}", unit="window", leave=False), starts, strict=False
    ):
        losses.append(token_losses(model, ids.to(model.device)).cpu())
        token.append(begin + torch.arange(1, length) - (length - room))
        document.append(number)
    return Losses(length, torch.stack(losses), torch.stack(token), torch.tensor(document))


def difference(a: Losses, b: Losses) -> Difference:
    """How much more ``b`` loses than ``a`` on the same tokens, in nats a token; by clusters."""
    return contrast([(1.0, b), (-1.0, a)])


def contrast(terms: Sequence[tuple[float, Losses]]) -> Difference:
    """A sum of losses of the same tokens, each times a number, in nats a token; by clusters."""
    first = terms[0][1]
    assert all(torch.equal(losses.token, first.token) for _, losses in terms), "all read the same windows"
    change = torch.stack([number * losses.losses.double() for number, losses in terms]).sum(0).flatten()
    group = first.clusters().flatten()
    names, inverse = group.unique(return_inverse=True)
    count = torch.zeros(len(names), dtype=torch.double).index_add(0, inverse, torch.ones_like(change))
    total = torch.zeros(len(names), dtype=torch.double).index_add(0, inverse, change)
    return paired((total / count).tolist(), names.tolist(), count.tolist())


GAIN, SURE, CONTEXT = 1.0, 2.0, 32
"""A key token's loss falls by so many nats with long context, to less than so many, from so many tokens of context."""


def key_tokens(short: Losses, long: Losses) -> Tensor:
    """The tokens (k,), of the whole text, that a model predicts well, but only with far context.

    ``short`` and ``long`` are one model's losses in short and in long windows. After LongPPL, Fang et al. 2024,
    arXiv:2410.23771, whose short context slides; here it is that of windows, so only tokens with 32 of it count.
    """
    without = {
        int(t): float(x) for t, x in zip(*(v[:, CONTEXT:].flatten() for v in (short.token, short.losses)), strict=True)
    }
    far = long.at(short.length, long.length - 1)
    return torch.tensor(
        [
            int(token)
            for token, loss in zip(far.token.flatten(), far.losses.flatten(), strict=True)
            if loss < SURE and without.get(int(token), 0.0) - loss > GAIN
        ],
        dtype=torch.long,
    )


def on_tokens(losses: Losses, tokens: Tensor) -> Losses:
    """Only these tokens' losses, each a window of its own."""
    chosen = torch.isin(losses.token, tokens)
    document = losses.document[:, None].expand_as(losses.token)[chosen]
    return Losses(losses.length, losses.losses[chosen][:, None], losses.token[chosen][:, None], document)
