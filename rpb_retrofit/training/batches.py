"""Sequences of tokens, cut and packed from documents whose borders no attention crosses."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.text.repeats import ordinary, plant
from rpb_retrofit.training.documents import Mixture, State
from rpb_retrofit.training.recipe import Stage

IGNORED = -100
"""A target that does not count."""

Row = list[Tensor]
"""A sequence: parts of documents, each (n,) token ids, which do not see one another."""


@dataclass(frozen=True)
class Layout:
    """How a model takes sequences.

    ``packed``: several documents in a row, told apart by positions that begin again; else one part of a document in a
    row, between what the tokenizer puts ``before`` and ``after`` it, padded. ``causal``: targets are next tokens.
    """

    packed: bool
    causal: bool
    before: Tensor
    after: Tensor
    padding: int


def layout_of(model: PreTrainedModel, tokenizer: Any, before: Tensor, after: Tensor) -> Layout:
    """Packed where the model tells documents in a row apart; otherwise a row holds one document."""
    anatomy = Anatomy.of(model)
    causal = all(anatomy.facts(name).causal for name in anatomy.attentions)
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Layout(causal and tells_documents_apart(model), causal, before, after, padding)


@torch.no_grad()
def tells_documents_apart(model: PreTrainedModel) -> bool:
    """Whether positions that begin again hide what comes before them, seen on a row of two tiny documents.

    Transformers does that for decoders whose masks it makes from ``position_ids``; not all families hand them on.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    parts = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    device = next(model.parameters()).device
    row = collate([parts], 5, Layout(True, True, parts[0][:0], parts[0][:0], 0)).to(device)
    with evaluating(model):
        together: Any = model(**row.inputs, use_cache=False)
        alone: Any = model(input_ids=parts[1][None].to(device), use_cache=False)
    expected = alone[0].float()
    return bool((together[0][:, 3:].float() - expected).abs().max() <= 0.01 * expected.abs().max())


@dataclass(frozen=True)
class RowRepeats:
    """What is planted in each part of a document, as of `rpb_retrofit.text.repeats.plant`."""

    share: float
    seed: int
    special: Sequence[int]
    noise: float


class Rows:
    """Sequences without end from documents without end, with ``repeats`` planted in each part of a document."""

    def __init__(self, documents: Mixture, layout: Layout, repeats: RowRepeats | None = None) -> None:
        self.documents, self.layout, self.repeats = documents, layout, repeats
        self._before = documents.state()
        self._document, self._offset, self._parts = torch.empty(0, dtype=torch.long), 0, 0
        self._known: Tensor | None = None

    def take(self, count: int, length: int) -> list[Row]:
        """The next ``count`` sequences of at most ``length`` tokens."""
        return [self._row(length) for _ in range(count)]

    def _row(self, length: int) -> Row:
        row: Row = []
        extra = 0 if self.layout.packed else len(self.layout.before) + len(self.layout.after)
        room = length - extra
        while room and not (row and not self.layout.packed):
            while self._offset == len(self._document):
                self._before = self.documents.state()
                self._document, self._offset, self._known = self.documents.next(), 0, None
            part = self._planted(self._document[self._offset : self._offset + room])
            self._offset += len(part)
            room -= len(part)
            row.append(part if self.layout.packed else torch.cat([self.layout.before, part, self.layout.after]))
        return row

    def _planted(self, part: Tensor) -> Tensor:
        self._parts += 1
        if (repeats := self.repeats) is None:
            return part
        if self._known is None:
            self._known = ordinary(self._document, repeats.special)
        random = Random(f"{repeats.seed} {self._parts}")
        return plant(part, repeats.share, self._known, random, repeats.special, repeats.noise)

    def state(self) -> State:
        """Where it stands: at a token of a document."""
        begun = len(self._document) > 0
        return {"documents": self._before, "offset": self._offset, "begun": begun, "parts": self._parts}

    def restore(self, state: State) -> None:
        """Go on from there."""
        self.documents.restore(state["documents"])
        self._before = state["documents"]
        self._document, self._offset, self._parts = torch.empty(0, dtype=torch.long), 0, state.get("parts", 0)
        self._known = None
        if state["begun"]:
            self._document, self._offset = self.documents.next(), state["offset"]


@dataclass(frozen=True)
class Batch:
    """Sequences as a model takes them, all (rows, length) int64; ``target`` is `IGNORED` where nothing counts."""

    input_ids: Tensor
    target: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model's forward."""
        given = {name: getattr(self, name) for name in ("input_ids", "position_ids", "attention_mask")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def scored(self) -> int:
        """Targets that count."""
        return int((self.target != IGNORED).sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    def part(self, index: Any) -> Batch:
        """Some of the rows."""
        return self._each(lambda x: x[index])

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        return self._each(lambda x: x.to(device))

    def _each(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: Any = {name: None if x is None else fn(x) for name, x in parts.items()}
        return Batch(**changed)


def collate(rows: Sequence[Row], length: int, layout: Layout) -> Batch:
    """Rows as one batch, with the next token as the target (causal) or every token (else)."""
    ids = torch.full((len(rows), length), layout.padding)
    target = torch.full((len(rows), length), IGNORED)
    position = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        at = 0
        for part in row:
            end = at + len(part)
            ids[number, at:end], mask[number, at:end] = part, 1
            position[number, at:end] = torch.arange(len(part))
            if layout.causal:
                target[number, at : end - 1] = part[1:]
            else:
                target[number, at:end] = part
            at = end
    return Batch(ids, target, position, None) if layout.packed else Batch(ids, target, None, mask)


def length_of_step(stage: Stage, seed: int, number: int, step: int) -> int:
    """The sequence length of a step, drawn from the stage's distribution; a function of seed, stage and step alone."""
    return Random(f"{seed}/{number}/{step}").choices(list(stage.lengths), weights=list(stage.lengths.values()))[0]


def bucketing_of(model: nn.Module) -> Bucketing | None:
    """The buckets of a model's tables, which are alike; None where it has none, as a control."""
    tables = (module for module in model.modules() if isinstance(module, RelativePositionBias))
    return next((table.bucketing for table in tables), None)


def pairs_by_bucket(lengths: Counter[int], bucketing: Bucketing) -> list[int]:
    """How many (query, key) pairs of documents' parts of such lengths, visible to one head, fall into each bucket."""
    if not lengths:
        return [0] * bucketing.num_buckets
    longest = max(lengths)
    # A part of n tokens has n - d pairs at distance d: count the parts longer than d, and their tokens beyond it.
    parts = torch.zeros(longest + 1, dtype=torch.long)
    for length, count in lengths.items():
        parts[length] = count
    longer = parts.flip(0).cumsum(0).flip(0)  # parts of at least n tokens
    pairs = longer[1:].flip(0).cumsum(0).flip(0)  # pairs at distance d = sum over n > d of parts of at least n
    distance = torch.arange(longest)
    counts = torch.zeros(bucketing.num_buckets, dtype=torch.long)
    counts.index_add_(0, bucket_of(distance, bucketing), pairs)
    if bucketing.bidirectional:
        counts.index_add_(0, bucket_of(-distance[1:], bucketing), pairs[1:])
    return counts.tolist()
