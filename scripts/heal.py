"""What healing costs and brings at a real source's own context: its retrofits are calibrated on a text, learn from the
source on so many tokens of it, and are measured on other texts, inside the context and at several times it.

The control, the source trained by the same recipe, is the source itself: it learns from its own predictions, so its
loss is zero from the first step on. Each arm is a process of its own, where wanted, and all arms share one accelerator:

    python scripts/heal.py SOURCE OUT --data faq.jsonl --held-out novel-1.txt --held-out novel-2.txt --arms kept-flat
    python scripts/heal.py SOURCE OUT --arms none --card card.md

OUT/ARM/result.json holds what was found so far; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from heal_card import write_card
from torch import Tensor

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.evaluation.context_use import make_inductions
from rpb_retrofit.evaluation.nll import losses_at, token_losses
from rpb_retrofit.evaluation.retrieval import cells, make_items, measure
from rpb_retrofit.evaluation.speed import is_out_of_memory
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.json_file import read_object
from rpb_retrofit.runtime.families import is_own
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.text import CalibrationText, Text, bos_policy, read_text, tokenise
from rpb_retrofit.training.identity import checksum, fingerprint
from rpb_retrofit.training.recipe import Data, Recipe, Stage
from rpb_retrofit.training.run import finetune

SOURCE = "source"

KEPT, FULL = {"keep_frequencies": "auto"}, {"calibrate": CONTENT}
ARMS: dict[str, dict[str, Any]] = {
    "kept-flat": {**KEPT, "tail": "flat"},
    "kept-log": {**KEPT, "tail": "log"},
    "full-flat": {**FULL, "tail": "flat"},
    "full-log": {**FULL, "tail": "log"},
}
ABOUT = {
    SOURCE: "the source as it is, which is also the control",
    "kept-flat": "RoPE's high frequencies kept, buckets to the context, then constant",
    "kept-log": "RoPE's high frequencies kept, buckets to a quarter of the context, then falling with the logarithm",
    "full-flat": "no rotation, factors on the content, buckets to the context, then constant",
    "full-log": "no rotation, factors on the content, buckets to a quarter of the context, then falling",
}

BUCKETS = 64
"""Scalars a head, where the maximum distance is no less."""

LAST = 512
"""Positions at the end of a window that are scored at several times the context; no more than half the context."""

SPAN = 16
"""Tokens of a span that is repeated."""

KINDS, DEPTHS = ("passkey", "multi-key"), (0.1, 0.5, 0.9)
"""What is asked of a long context, and where in it the answer stands."""


@dataclass(frozen=True)
class Plan:
    """What is done. ``length`` is the context that is trained, in tokens, and ``times`` it the longer windows.

    ``tokens`` of training; ``calibration`` tokens; ``windows`` of the context that are scored inside it; ``ends`` of
    windows that are scored at all lengths; ``items`` of each kind of question, depth and length.
    """

    source: str
    data: tuple[str, ...]
    held_out: tuple[str, ...]
    length: int = 8192
    times: tuple[int, ...] = (2, 4, 8)
    tokens: int = 5_000_000
    batch_tokens: int = 16_384
    rate: float = 3e-4
    table_rate: float = 1e-2
    precision: str = "bf16"
    calibration: int = 16_384
    windows: int = 24
    ends: int = 16
    items: int = 2
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Of the context, and of several times it."""
        return [self.length, *(times * self.length for times in self.times)]

    @property
    def last(self) -> int:
        """Positions that are scored at the end of a window."""
        return min(LAST, self.length // 2)

    @property
    def recipe(self) -> Recipe:
        """Distillation of the source at its own context."""
        steps = -(-self.tokens // self.batch_tokens)
        stage = Stage(
            tokens=self.tokens,
            rate=self.rate,
            table_rate=self.table_rate,
            lengths={self.length: 1.0},
            warmup=0.05,
        )
        return Recipe.model_validate(
            {
                "stages": [stage],
                "data": [Data(name=name) for name in self.data],
                "batch_tokens": self.batch_tokens,
                "micro_tokens": self.length,
                "precision": self.precision,
                "seed": self.seed,
                "save_every": 10**9,
                "evaluate_every": max(1, steps // 4),
                "evaluate_tokens": 2 * self.length,
                "trackers": [],
            }
        )

    def config(self, arm: str) -> rpb.RetrofitConfig:
        """What an arm is. A tail that falls begins well inside the context, where its slope is fitted and trained."""
        settings = ARMS[arm]
        distance = self.length // 4 if settings["tail"] == "log" else self.length
        return rpb.RetrofitConfig(
            relative_attention_num_buckets=min(BUCKETS, distance),
            relative_attention_max_distance=distance,
            seed=self.seed,
            **settings,
        )


# --- what was found --------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The parts of an arm's result by name, in a file that is whole at any time."""

    file: Path
    arm: str
    plan: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, arm: str, plan: Plan) -> Record:
        """The record in a folder, which is made. ConfigError where it holds another plan's."""
        file, texts = folder / "result.json", [name for name in (*plan.data, *plan.held_out) if Path(name).is_file()]
        read = {"weights": fingerprint(plan.source), "texts": {name: checksum(Path(name)) for name in texts}}
        wanted = json.loads(json.dumps({**asdict(plan), **read}))
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            return cls(file, arm, wanted)
        found = read_object(file)
        if different := [key for key in wanted if found["plan"].get(key) != wanted[key]]:
            raise ConfigError(f"'{folder}' holds a result with other {', '.join(different)}: choose another OUT")
        return cls(file, arm, wanted, found["parts"])

    def __call__(self, name: str, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part ``name``: found out now, unless it was before; with what the ``whole`` of it took."""
        if name not in self.parts:
            with watched() as seen:
                found = find_out()
            self.parts[name] = json.loads(json.dumps({**found, "whole": seen}))
            peak = f", {seen['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in seen else ""
            say(self.arm, f"{name}: took {seen['seconds']:.1f} s{peak}")
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps({"arm": self.arm, "plan": self.plan, "parts": self.parts}, indent=1) + "\n")
            part.replace(self.file)
        return self.parts[name]


_START = time.perf_counter()


def say(arm: str, line: str) -> None:
    """A line of the log, with the seconds since the process began."""
    print(f"[{time.perf_counter() - _START:7.1f} s] {arm}: {line}", file=sys.stderr, flush=True)


# --- an arm ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Held-out documents as tokens, and the token that begins every window."""

    documents: list[Tensor]
    bos: int | None

    @classmethod
    def of(cls, plan: Plan, tokenizer: Any) -> Texts:
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
class Arm:
    """One arm: what it takes to make, train and measure it, each part once."""

    name: str
    folder: Path
    plan: Plan
    tokenizer: Any = None

    @cached_property
    def record(self) -> Record:
        """What is known of it."""
        return Record.open(self.folder, self.name, self.plan)

    @cached_property
    def texts(self) -> Texts:
        """Held-out text, tokenised once a model was opened."""
        return Texts.of(self.plan, self.tokenizer)

    @property
    def retrofitted(self) -> Path:
        """Where its retrofit is, calibrated only."""
        return self.folder / "retrofit"

    @property
    def healed(self) -> Path:
        """Where it is after training."""
        return self.folder / "healed"

    def run(self) -> None:
        """Everything."""
        say(self.name, ABOUT[self.name])
        if self.name != SOURCE:
            self.record("made", self.make)
            self._measure("before", self.retrofitted, {"inside": self.inside})
            self.record("trained", self.train)
        parts = {"inside": self.inside, "beyond": self.beyond, "questions": self.questions, "spans": self.spans}
        self._measure("after", self.healed, parts)
        say(self.name, "done")

    def make(self) -> dict[str, Any]:
        """Retrofit the source in memory, on the accelerator, and save it."""
        model, tokenizer = open_causal_lm(self.plan.source)
        say(self.name, f"source loaded, on {model.device}")
        documents = [document for file in self.plan.data for document in read_text(file).documents]
        text = CalibrationText(Text("training text", documents), self.plan.calibration, self.plan.length)
        windows = text.windows(tokenizer, self.plan.length)
        say(self.name, f"{len(windows)} windows to calibrate on")
        report = rpb.retrofit(model, self.plan.config(self.name), calibration=windows)
        say(self.name, str(report))
        if not self.retrofitted.exists():
            with whole_folder(self.retrofitted) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        return {"report": str(report)}

    def train(self) -> dict[str, Any]:
        """`rpb finetune`, in this process."""
        told = partial(say, self.name)
        summary = finetune(str(self.retrofitted), self.healed, self.plan.recipe, reuse=True, say=told)
        told(str(summary))
        (stage,) = summary.stages
        kept = ("steps", "scored_tokens", "seconds", "losses", "evaluations", "untrained_buckets")
        found = {name: getattr(stage, name) for name in kept}
        return {**found, "tokens_per_s": stage.scored_tokens / stage.seconds}

    def _measure(self, when: str, folder: Path, parts: dict[str, Callable[[Any], Any]]) -> None:
        """All parts that are not known yet, on one model in bfloat16."""
        left = {f"{when}: {name}": part for name, part in parts.items() if f"{when}: {name}" not in self.record.parts}
        if not left:
            return
        model, self.tokenizer = open_causal_lm(self.plan.source if self.name == SOURCE else str(folder))
        halve(model)
        for name, part in left.items():
            self.record(name, partial(part, model))
        del model
        release()

    def inside(self, model: Any) -> dict[str, Any]:
        """Losses inside the context, by window and by position."""
        length = self.plan.length
        places = self.texts.ends(length, length, self.plan.windows)
        with torch.no_grad():
            rows = [token_losses(model, self.texts.window(*place, length).to(model.device)).cpu() for place in places]
        losses = torch.stack(rows).double()
        bins = [(2**power, min(2 ** (power + 1), length) - 1) for power in range((length - 1).bit_length())]
        say(self.name, f"inside the context: {losses.mean():.4f} nats a token")
        return {
            "nll": losses.mean().item(),
            "tokens": losses.numel(),
            "windows": _by_document(places, losses),
            "by_position": [[first, last, losses[:, first - 1 : last].mean().item()] for first, last in bins],
        }

    def beyond(self, model: Any) -> dict[str, Any]:
        """Losses of the same last tokens of windows, with ever more text before them."""
        places = self.texts.ends(max(self.plan.lengths), self.plan.length, self.plan.ends)

        def score(length: int) -> dict[str, Any]:
            windows = [self.texts.window(*place, length).to(model.device) for place in places]
            losses = torch.stack([last_losses(model, ids, self.plan.last).cpu() for ids in windows]).double()
            return {"nll": losses.mean().item(), "windows": _by_document(places, losses)}

        return self._by_length("the last positions", score)

    def questions(self, model: Any) -> dict[str, Any]:
        """What it finds in a text."""

        def ask(length: int) -> dict[str, Any]:
            items, skipped = [], {}
            for kind in KINDS:
                try:
                    filler = self.texts.documents
                    items += make_items(kind, self.tokenizer, filler, [length], DEPTHS, self.plan.items, self.plan.seed)
                except DataError as error:
                    skipped[kind] = str(error)
            rows = measure(model, items, progress=False)
            return {"rows": rows, "cells": [asdict(cell) for cell in cells(rows)], "skipped": skipped}

        return self._by_length("questions", ask)

    def spans(self, model: Any) -> dict[str, Any]:
        """What a span of random tokens gains from having stood at the beginning of the text."""

        def gain(length: int) -> dict[str, Any]:
            distance, count = length - SPAN - (self.texts.bos is not None), 2 * self.plan.items
            documents = self.texts.documents
            spans = make_inductions(documents, [distance], count, self.plan.seed, SPAN, self.texts.bos)
            rows = measure(model, spans, progress=False)
            return {"rows": rows, "gain": fmean(row["gain"] for row in rows)}

        return self._by_length("repeated spans", gain)

    def _by_length(self, what: str, find_out: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """Of each length; where memory does not suffice, that."""
        found = []
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
            found.append({"length": length, **one, "seconds": seconds})
        return {"lengths": found}


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


# --- the command -----------------------------------------------------------------------------------------------------


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a GGUF file, a folder or a hub id")
    parser.add_argument("out", type=Path, help="a folder, which is made or gone on with")
    parser.add_argument("--data", action="append", default=[], help="text to calibrate and train on; may come again")
    parser.add_argument("--held-out", action="append", default=[], help="text to measure on; may come again")
    parser.add_argument("--arms", default=",".join((SOURCE, *ARMS)), help="which, with commas between, or none")
    for name in ("length", "tokens", "batch-tokens", "calibration", "windows", "ends", "items", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name.replace("-", "_")))
    for name in ("rate", "table-rate"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Plan, name.replace("-", "_")))
    parser.add_argument("--precision", choices=("bf16", "no"), default=Plan.precision)
    parser.add_argument("--times", default=",".join(map(str, Plan.times)), help="how many times the context")
    parser.add_argument("--card", type=Path, help="a Markdown file for what is known of all arms, with a picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    arms = [] if options.arms == "none" else options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ABOUT]:
        raise ConfigError(f"arm '{unknown[0]}': choose from {', '.join(ABOUT)}, or none")
    given = {name: value for name, value in vars(options).items() if name in Plan.__dataclass_fields__}
    given |= {"data": tuple(options.data), "held_out": tuple(options.held_out)}
    plan = Plan(**{**given, "times": tuple(map(int, options.times.split(",")))})
    if arms and not (plan.data and plan.held_out):
        raise ConfigError("give --data to train on, and --held-out to measure on")
    for arm in arms:
        Arm(arm, options.out / arm, plan).run()
    if options.card:
        write_card(options.out, options.card, ABOUT)


if __name__ == "__main__":
    main()
