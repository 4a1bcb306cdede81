"""What scripts/heal.py measures of a model: losses inside the context and beyond, questions, repeated spans."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from heal_plan import HealingPlan
from torch import Tensor

from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.context_use import make_inductions
from rpb_retrofit.evaluation.nll import losses_at, token_losses
from rpb_retrofit.evaluation.retrieval import cells, make_items, measure
from rpb_retrofit.evaluation.speed import is_out_of_memory
from rpb_retrofit.runtime.families import is_own
from rpb_retrofit.text.reading import read_text
from rpb_retrofit.text.tokens import bos_policy, tokenise

SPAN = 16
"""Tokens of a span that is repeated."""

KINDS, DEPTHS = ("passkey", "multi-key"), (0.1, 0.5, 0.9)
"""What is asked of a long context, and where in it the answer stands."""


_START = time.perf_counter()


def say(arm: str, line: str) -> None:
    """A line of the log, with the seconds since the process began."""
    print(f"[{time.perf_counter() - _START:7.1f} s] {arm}: {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class HeldOutTexts:
    """Held-out documents as tokens, and the token that begins every window."""

    documents: list[Tensor]
    bos: int | None

    @classmethod
    def of(cls, plan: HealingPlan, tokenizer: Any) -> HeldOutTexts:
        """The plan's held-out files."""
        documents = [document for file in plan.held_out for document in read_text(file, "--held-out").documents]
        return cls(tokenise(tokenizer, documents), bos_policy(tokenizer, "auto"))

    def window(self, document: int, end: int, length: int) -> Tensor:
        """The ``length`` tokens of a document up to ``end``, the first of them the one that begins every window."""
        if self.bos is None:
            return self.documents[document][end - length : end]
        return torch.cat([torch.tensor([self.bos]), self.documents[document][end - length + 1 : end]])

    def ends(self, length: int, apart: int, count: int) -> list[tuple[int, int]]:
        """``count`` places (document, end), ``apart`` tokens or more, that windows of ``length`` can end at; spread
        evenly. DataError where there is none."""
        places = [(i, end) for i, ids in enumerate(self.documents) for end in range(length, len(ids) + 1, apart)]
        if not places:
            longest = max(map(len, self.documents), default=0)
            raise DataError(f"held-out text: the longest document has {longest} tokens, a window takes {length}")
        count = min(count, len(places))
        return [places[i * len(places) // count] for i in range(count)]


@dataclass
class MeasuredModel:
    """A model of the arm ``name``, its weights in bfloat16; each measurement is plain numbers, as JSON takes them."""

    name: str
    plan: HealingPlan
    model: Any
    tokenizer: Any

    @classmethod
    def open(cls, name: str, plan: HealingPlan, place: str | Path) -> MeasuredModel:
        """The model in a folder or GGUF file."""
        model, tokenizer = open_causal_lm(str(place))
        halve(model)
        return cls(name, plan, model, tokenizer)

    @cached_property
    def texts(self) -> HeldOutTexts:
        """Held-out text as its tokens."""
        return HeldOutTexts.of(self.plan, self.tokenizer)

    def inside(self) -> dict[str, Any]:
        """Losses inside the context, by window and by position."""
        length = self.plan.length
        places = self.texts.ends(length, length, self.plan.windows)
        with torch.no_grad():
            rows = [
                token_losses(self.model, self.texts.window(*place, length).to(self.model.device)).cpu()
                for place in places
            ]
        losses = torch.stack(rows).double()
        bins = [(2**power, min(2 ** (power + 1), length) - 1) for power in range((length - 1).bit_length())]
        say(self.name, f"inside the context: {losses.mean():.4f} nats a token")
        return {
            "nll": losses.mean().item(),
            "tokens": losses.numel(),
            "windows": _by_document(places, losses),
            "by_position": [[first, last, losses[:, first - 1 : last].mean().item()] for first, last in bins],
        }

    def beyond(self) -> dict[str, Any]:
        """Losses of the same last tokens of windows, with ever more text before them."""
        places = self.texts.ends(max(self.plan.lengths), self.plan.length, self.plan.ends)

        def score(length: int) -> dict[str, Any]:
            windows = [self.texts.window(*place, length).to(self.model.device) for place in places]
            losses = torch.stack([last_losses(self.model, ids, self.plan.last).cpu() for ids in windows]).double()
            return {"nll": losses.mean().item(), "windows": _by_document(places, losses)}

        return self._by_length("the last positions", score)

    def questions(self) -> dict[str, Any]:
        """What it finds in a text."""

        def ask(length: int) -> dict[str, Any]:
            items, skipped = [], {}
            for kind in KINDS:
                try:
                    filler = self.texts.documents
                    items += make_items(kind, self.tokenizer, filler, [length], DEPTHS, self.plan.items, self.plan.seed)
                except DataError as error:
                    skipped[kind] = str(error)
            rows = measure(self.model, items, progress=False)
            return {"rows": rows, "cells": [asdict(cell) for cell in cells(rows)], "skipped": skipped}

        return self._by_length("questions", ask)

    def spans(self) -> dict[str, Any]:
        """What a span of random tokens gains from having stood at the beginning of the text."""

        def gain(length: int) -> dict[str, Any]:
            distance, count = length - SPAN - (self.texts.bos is not None), 2 * self.plan.items
            documents = self.texts.documents
            spans = make_inductions(documents, [distance], count, self.plan.seed, SPAN, self.texts.bos)
            rows = measure(self.model, spans, progress=False)
            return {"rows": rows, "gain": fmean(row["gain"] for row in rows)}

        return self._by_length("repeated spans", gain)

    def _by_length(self, what: str, find_out: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """Of each length; where memory does not suffice, that."""
        rows = []
        for length in self.plan.lengths:
            start = time.perf_counter()
            try:
                one = find_out(length)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                one = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
            release()
            seconds = time.perf_counter() - start
            figures = {name: one[name] for name in ("nll", "gain", "failed") if name in one}
            say(self.name, f"{what} at {length} tokens: {figures or 'done'} in {seconds:.1f} s")
            rows.append({"length": length, **one, "seconds": seconds})
        return {"lengths": rows}


def halve(model: Any) -> None:
    """Let the weights be bfloat16. Tables stay as they are, and so do RoPE's frequencies, which ``model.to`` would
    round as well: far positions would turn by other angles."""
    for name, parameter in model.named_parameters():
        if not is_own(name):
            parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def last_losses(model: Any, ids: Tensor, count: int) -> Tensor:
    """Losses (count,) of the last tokens of ``ids`` (n,), in nats."""
    at = torch.arange(len(ids) - count - 1, len(ids) - 1, device=ids.device)
    return losses_at(model, ids, at)


def _by_document(places: Sequence[tuple[int, int]], losses: Tensor) -> list[dict[str, Any]]:
    """The mean loss of each window, and whose it is."""
    means = losses.mean(1).tolist()
    return [{"document": d, "end": end, "nll": nll} for (d, end), nll in zip(places, means, strict=True)]


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Inside, time and the accelerator's memory are watched; the dictionary holds them at the end."""
    seen: dict[str, Any] = {}
    start, cuda = time.perf_counter(), torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    yield seen
    seen["seconds"] = time.perf_counter() - start
    if cuda:
        seen["peak_bytes"] = torch.cuda.max_memory_allocated()
    release()


def release() -> None:
    """Give the accelerator's memory back to the other arms."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
