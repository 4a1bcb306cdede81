"""Documents without end, in an order that a seed fixes, from one source or several, resumable at the very next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import torch
from datasets import load_dataset
from torch import Tensor

from rpb_retrofit.errors import DataError
from rpb_retrofit.files.printable import first_line
from rpb_retrofit.files.source import may_be_hub_id
from rpb_retrofit.text.reading import decoded, read_rows, read_text
from rpb_retrofit.training.recipe import Data, Recipe

State = dict[str, Any]
"""What JSON can hold."""

AHEAD = 2**20
"""Characters of documents that are tokenised at a time: tokenizers take many at once in parallel."""

FEW = 20
"""Fewer documents than that are cut to keep text apart; of more, whole ones are."""


class View(Sequence[str]):
    """Some of the documents of another sequence, by index."""

    def __init__(self, documents: Sequence[str], indices: Sequence[int]) -> None:
        self.documents, self.indices = documents, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return View(self.documents, self.indices[index])
        return self.documents[self.indices[index]]


def hold_out(documents: Sequence[str], share: float) -> tuple[Sequence[str], list[str]]:
    """Documents to train on, and about ``share`` of the text to evaluate on: every so many-th document, or the ends of
    few."""
    if len(documents) >= FEW:
        every = max(2, round(1 / share))
        kept = [i for i in range(len(documents)) if (i + 1) % every]
        return View(documents, kept), [documents[i] for i in range(every - 1, len(documents), every)]
    cuts = [(document, round(len(document) * (1 - share))) for document in documents]
    return [document[:cut] for document, cut in cuts], [document[cut:] for document, cut in cuts]


class Finite:
    """Documents that are at hand, again and again, each time in another order."""

    def __init__(self, name: str, documents: Sequence[str], seed: int) -> None:
        self.name, self.documents, self.seed = name, documents, seed
        self.epoch, self.index, self._order = 0, 0, self._shuffled(0)

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.documents), generator=generator)

    def next(self) -> str:
        """The next document."""
        if self.index == len(self.documents):
            self.epoch, self.index = self.epoch + 1, 0
            self._order = self._shuffled(self.epoch)
        self.index += 1
        return self.documents[int(self._order[self.index - 1])]

    def ahead(self) -> Iterator[str]:
        """The documents after that, of this time."""
        return (self.documents[int(number)] for number in self._order[self.index :])

    def state(self) -> State:
        """Where it stands."""
        return {"epoch": self.epoch, "index": self.index}

    def restore(self, state: State) -> None:
        """Go on from there."""
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._shuffled(self.epoch)


class Streaming:
    """Rows of a dataset as they come, from the beginning again at its end."""

    def __init__(self, name: str, rows: Any, column: str) -> None:
        self.name, self.rows, self.column, self.epoch = name, rows, column, 0
        self._beginning = rows.state_dict()
        self._iterator: Iterator[Any] = iter(rows)

    def next(self) -> str:
        """The next document."""
        for _ in range(2):
            while (document := self._row()) is not None:
                if document.strip():
                    return document
            self.epoch += 1
            self.rows.load_state_dict(self._beginning)  # or it would begin again where it was last restored
            self._iterator = iter(self.rows)
        raise DataError(f"data '{self.name}' holds no text")

    def _row(self) -> str | None:
        """The next row's text, empty where it has none; None at the end."""
        for row in decoded(islice(self._iterator, 1), f"data '{self.name}'"):
            return "" if row[self.column] is None else _text(row[self.column], self.name)
        return None

    def state(self) -> State:
        """Where it stands."""
        return {"epoch": self.epoch, "rows": self.rows.state_dict()}

    def restore(self, state: State) -> None:
        """Go on from there."""
        self.epoch = state["epoch"]
        self.rows.load_state_dict(state["rows"])
        self._iterator = iter(self.rows)


def _text(document: Any, name: str) -> str:
    if not isinstance(document, str):
        raise DataError(f"data '{name}' holds {type(document).__name__} where text is wanted")
    return document


class Mixture:
    """Documents as tokens from several sources, whose tokens keep to the weights as closely as documents allow.

    The next document comes from the source that is furthest behind, so nothing is drawn and nothing needs a seed.
    ``encode`` makes token ids (n,) of each of some documents.
    """

    def __init__(
        self,
        sources: Sequence[Finite | Streaming],
        weights: Sequence[float],
        encode: Callable[[Sequence[str]], Sequence[Tensor]],
    ) -> None:
        self.sources, self.weights, self.encode = sources, weights, encode
        self.tokens = [0] * len(sources)
        self._known: list[dict[str, Tensor]] = [{} for _ in sources]

    def next(self) -> Tensor:
        """Token ids (n,) of the next document."""
        behind = min(range(len(self.sources)), key=lambda i: self.tokens[i] / self.weights[i])
        ids = self._ids_of(self.sources[behind].next(), behind)
        self.tokens[behind] += max(len(ids), 1)
        return ids

    def _ids_of(self, document: str, source: int) -> Tensor:
        """Its tokens; where it was not tokenised before, those that come after it are tokenised with it."""
        if document not in self._known[source]:
            documents, room, stream = [document], AHEAD - len(document), self.sources[source]
            for following in stream.ahead() if isinstance(stream, Finite) and room > 0 else ():
                if (room := room - len(following)) < 0:
                    break
                documents.append(following)
            self._known[source] = dict(zip(documents, self.encode(documents), strict=True))
        return self._known[source][document]

    def count_up_to(self, enough: int) -> int:
        """Tokens of the first documents until there are ``enough``, or of all; the stream stays where it is."""
        before, tokens = self.state(), 0
        documents = sum(len(s.documents) if isinstance(s, Finite) else enough for s in self.sources)
        for _ in range(documents):
            if tokens >= enough:
                break
            tokens += len(self.next())
        self.restore(before)
        return tokens

    def state(self) -> State:
        """Where it stands."""
        return {"tokens": list(self.tokens), "sources": [source.state() for source in self.sources]}

    def restore(self, state: State) -> None:
        """Go on from there."""
        self.tokens = list(state["tokens"])
        for source, one in zip(self.sources, state["sources"], strict=True):
            source.restore(one)


def open_sources(recipe: Recipe) -> tuple[list[Finite | Streaming], list[float], list[str]]:
    """The sources of a recipe, their weights, and the documents that are kept apart.

    Raises DataError for what is missing, empty, not UTF-8, or without the column.
    """
    apart = list(read_text(recipe.held_out, "held_out").documents) if recipe.held_out else None
    sources: list[Finite | Streaming] = []
    held: list[str] = apart or []
    wanted: list[Data | None] = [*recipe.data] or [None]
    for data in wanted:
        name, rows, streaming = _open(data)
        if streaming:
            assert data is not None
            if apart is None and recipe.evaluate_tokens:
                raise DataError(
                    f"data '{name}' is streamed, so no part can be kept apart: give a file as held_out, or set "
                    "evaluate_tokens=0"
                )
            sources.append(Streaming(name, rows, data.column))
            continue
        filled = [
            i for i, row in enumerate(decoded(rows, f"data '{name}'")) if row is not None and _text(row, name).strip()
        ]
        if not filled:
            raise DataError(f"data '{name}' holds no text")
        rows = View(rows, filled)
        if apart is None:
            rows, kept = hold_out(rows, recipe.held_out_share)
            held += kept
        sources.append(Finite(name, rows, recipe.seed))
    return sources, [data.weight for data in recipe.data] or [1.0], held


def _open(data: Data | None) -> tuple[str, Any, bool]:
    """Name, documents (or the rows of a stream), and whether they are streamed."""
    if data is None:
        text = read_text(None, "data")
        return text.name, text.documents, False
    path = Path(data.name).expanduser()
    if path.is_dir():
        raise DataError(f"data '{data.name}' is a folder: name the files in it, one by one")
    if path.is_file() or path.suffix or not may_be_hub_id(data.name):
        return path.name, read_rows(data.name, "data", data.column, data.streaming), data.streaming
    try:
        rows = load_dataset(data.name, data.subset, split=data.split, streaming=data.streaming)
        names = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # whatever the hub and its files raise
        raise DataError(f"data '{data.name}' cannot be loaded: {first_line(error)}") from error
    if data.column not in names:
        raise DataError(f"data '{data.name}' has no column '{data.column}', only {', '.join(names)}")
    return data.name, rows if data.streaming else rows[data.column], data.streaming
