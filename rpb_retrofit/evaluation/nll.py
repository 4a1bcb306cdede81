"""Negative log-likelihood of the next token, by context length and by position inside the window."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rpb_retrofit.errors import DataError

AT_ONCE = 4096
"""Tokens whose losses are computed at a time."""


@dataclass(frozen=True)
class Windows:
    """How text is cut: windows of ``length`` tokens, one every ``stride`` tokens, never across two documents.

    With ``stride`` below ``length`` windows overlap, and each token is scored once, with the longer context. With
    ``bos`` every window begins with that token, which counts towards ``length`` and is not scored.
    """

    length: int
    stride: int
    bos: int | None

    def cut(self, documents: Sequence[Tensor], budget: int) -> Iterator[tuple[Tensor, int]]:
        """Windows (length,) and how many of their last tokens count, until ``budget`` tokens of text are used."""
        room = self.length - (self.bos is not None)
        for document in documents:
            for start in range(0, len(document) - room + 1, self.stride):
                if budget < room:
                    return
                budget -= min(self.stride, room) if start else room
                ids = document[start : start + room]
                if self.bos is not None:
                    ids = torch.cat([torch.tensor([self.bos]), ids])
                yield ids, self.length - 1 if start == 0 else min(self.stride, self.length - 1)


@dataclass(frozen=True)
class PositionBin:
    """Tokens whose position in the window (their context, in tokens) is ``first`` to ``last``."""

    first: int
    last: int
    nll: float
    tokens: int


@dataclass(frozen=True)
class LengthResult:
    """Mean negative log-likelihood, in nats a token, each token counting the same."""

    length: int
    nll: float
    tokens: int
    windows: int
    by_position: list[PositionBin]


@torch.no_grad()
def nll_at_length(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    windows: Windows,
    budget: int,
    label: str = "",
    quiet: bool = False,
) -> LengthResult:
    """Score up to ``budget`` tokens of text in windows of one length.

    Bins of positions are powers of two: 1, 2-3, 4-7, ... Raises DataError where no document fills a window, or the
    model cannot take one.
    """
    check_length(model, windows.length)
    cut = list(windows.cut(documents, budget))
    if not cut:
        longest = max(map(len, documents))
        raise DataError(
            f"length {windows.length}: no window fits (longest document {longest} tokens, budget {budget} tokens): "
            "give longer text, a shorter length, or more --tokens"
        )
    total = torch.zeros(windows.length, dtype=torch.float64)
    count = torch.zeros(windows.length, dtype=torch.long)
    device = next(model.parameters()).device
    shown: dict[str, Any] = {"disable": True} if quiet else {}
    with tqdm(
        total=len(cut) * windows.length, unit="tok", desc=f"{label}{windows.length}", leave=False, **shown
    ) as bar:
        for ids, scored in cut:
            losses = token_losses(model, ids.to(device))[-scored:].double().cpu()
            positions = torch.arange(windows.length - scored, windows.length)
            total[positions] += losses
            count[positions] += 1
            bar.update(windows.length)
    return LengthResult(
        length=windows.length,
        nll=(total.sum() / count.sum()).item(),
        tokens=int(count.sum()),
        windows=len(cut),
        by_position=position_bins(total, count),
    )


def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Losses (n - 1,) of the tokens 1 .. n-1 of ``ids`` (n,), float32, in nats."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    parts = zip(logits.split(AT_ONCE), ids[1:].split(AT_ONCE), strict=True)  # float32 copies of all would not fit
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), target, reduction="none") for x, target in parts])


def logits_at(model: PreTrainedModel, ids: Tensor, at: Tensor) -> Tensor:
    """Logits (k, vocabulary), float32, at the positions ``at`` (k,) of ``ids`` (n,): where the model's head can be told
    so, no others are computed."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids[None], use_cache=False, logits_to_keep=at).logits[0].float()
    return model(input_ids=ids[None], use_cache=False).logits[0, at].float()


def losses_at(model: PreTrainedModel, ids: Tensor, at: Tensor) -> Tensor:
    """Losses (k,) of the tokens that follow the positions ``at`` (k,) of ``ids`` (n,), float32, in nats."""
    return torch.nn.functional.cross_entropy(logits_at(model, ids, at), ids[at + 1], reduction="none")


def check_ids(model: PreTrainedModel, documents: Sequence[Tensor]) -> None:
    """DataError where the text has token ids that the model has no row for: a tokenizer that is not its own.

    On a GPU such an id ends the process, on a CPU it is an IndexError without a name.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    highest = max((int(ids.max()) for ids in documents if len(ids)), default=-1)
    if highest >= rows:
        raise DataError(
            f"'{model.name_or_path}': its tokenizer makes token {highest}, and the model knows {rows} tokens, 0 to "
            f"{rows - 1}: the tokenizer beside it is another model's, or tokens were added without resizing the model"
        )


def check_length(model: PreTrainedModel, length: int) -> None:
    """DataError where a source's position table ends before ``length``."""
    config = model.config
    learned = any("position" in name or name.endswith("wpe.weight") for name, _ in model.named_parameters())
    longest = getattr(config, "max_position_embeddings", None)
    if learned and longest and length > longest and getattr(config, "rpb_retrofit", None) is None:
        raise DataError(
            f"length {length}: '{model.name_or_path}' has a table of {longest} positions and cannot take it"
        )


def position_bins(total: Tensor, count: Tensor) -> list[PositionBin]:
    """Mean losses in bins of powers of two, of the ``total`` (length,) and ``count`` (length,) of each position."""
    bins = []
    for power in range(math.ceil(math.log2(len(total)))):
        first, last = 2**power, min(2 ** (power + 1), len(total)) - 1
        if tokens := int(count[first : last + 1].sum()):
            bins.append(PositionBin(first, last, (total[first : last + 1].sum() / tokens).item(), tokens))
    return bins
