"""`rpb_retrofit.compare`: which positional mechanism to take for a target length, measured on the user's own model."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.comparison.healing import Healing
from rpb_retrofit.comparison.measures import ComparisonPlan
from rpb_retrofit.comparison.request import Request
from rpb_retrofit.comparison.result import ComparisonResult
from rpb_retrofit.comparison.run import MEASURED, Compare
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.inputs import GivenModel, GivenText, OpenModel, name_of, open_given
from rpb_retrofit.evaluation.nll import check_ids
from rpb_retrofit.files.digest import digest_of
from rpb_retrofit.files.folder import check_absent
from rpb_retrofit.files.journal import Journal
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import family_of
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.tokens import bos_policy, tokenise
from rpb_retrofit.training.identity import checksum, fingerprint, texts_of

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


def compare(
    source: GivenModel,
    *,
    tokenizer: Any = None,
    target_length: int | None = None,
    max_slowdown: float | None = None,
    must_keep: float | None = None,
    train_tokens: int | None = None,
    arms: Sequence[str] | None = None,
    data: GivenText = None,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    calibration: GivenText = None,
    calibration_tokens: int = 8192,
    calibration_length: int | None = None,
    heal: int | None = None,
    train_data: str | os.PathLike[str] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
    seeds: int = 1,
    retrieval: Sequence[str] = ("passkey",),
    items: int = 2,
    asked: Sequence[int] | None = None,
    timed: Sequence[int] | None = None,
    rounds: int = 3,
    bos: str = "auto",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    say: Say = silent,
    command: str | None = None,
) -> ComparisonResult:
    """Put every arm into twins of ``source``, which stays as it is, measure them on one text, and choose one.

    Args:
        source, tokenizer: a folder, a hub id, a GGUF file, or a causal model in memory with its tokenizer.
        target_length: tokens it is to read; by default twice its context. arms: names as of `arms.parse`.
        max_slowdown, must_keep, train_tokens: the constraints, as of `Constraints`.
        data, calibration: text that is scored, and that T5 arms are fitted to (so many tokens of it, in windows of a
            length): a file or a list of documents; by default the two halves of Python's help texts.
        lengths, tokens: of windows, and of the text that is scored, the same at every length.
        heal, train_data: tokens that each arm is trained on, and a file or a hub id; rates: the best is taken; seeds:
            trainings of each arm; recipe: a file, as of `rpb finetune`, by default the next token.
        retrieval, items, asked: kinds of questions, how many of each, and at which lengths. timed, rounds: of prompts.
        out: a new folder for report.html and report.json, where an interrupted comparison goes on; None writes nothing.
        say: takes lines on the progress; command: what the report says how to repeat it.

    Raises ConfigError, DataError and CheckpointError, each in one line that names the option of `rpb compare`.
    """
    given = locals()
    return _Run(Request.of(given), source, tokenizer, out, say, command or _call(given)).result()


@dataclass
class _Run:
    """One comparison: what is asked, of which model, and where the report goes."""

    request: Request
    source: GivenModel
    tokenizer: Any
    out: str | os.PathLike[str] | None
    say: Say
    command: str
    start: float = field(default_factory=time.perf_counter)

    def result(self) -> ComparisonResult:
        """All of it, from opening the model to writing the report."""
        folder = None if self.out is None else Path(self.out)
        if folder is not None:
            check_absent(folder)
        scored, fitted = self.request.texts()
        opened = open_given(self.source, self.tokenizer)
        with opened.evaluating() as network:
            context = Anatomy.of(network).context
            plan = self.request.plan(opened.name, context)
            documents = tokenise(opened.tokenizer, scored.documents)
            check_ids(network, documents)
            _check_long_enough(plan, scored.name, documents)
            healing = self.request.healing(opened, context)
            calibration = CalibrationText(fitted, self.request.calibration_tokens, self.request.calibration_length)
            windows = calibration.windows(opened.tokenizer, context)
            with ExitStack() as held:
                journal = Journal()
                if folder is not None:
                    identity = self.identity(opened, plan, scored, fitted, healing)
                    place = folder.with_name(f"{folder.name}.run")
                    journal = held.enter_context(Journal.open(place, identity, "rpb compare", MEASURED, self.say))
                comparison = Compare(network, self.request.names, plan, windows, journal, self.say).run(
                    documents, bos_policy(opened.tokenizer, self.request.bos), opened.tokenizer, healing
                )
                about = self.about(opened, plan, scored, fitted)
                result = ComparisonResult.of(comparison, self.request.constraints, about)
                if folder is not None:
                    result.write(folder)
                    journal.remove()
        return result

    def identity(
        self, opened: OpenModel, plan: ComparisonPlan, scored: Text, fitted: Text, healing: Healing | None
    ) -> dict[str, Any]:
        """What the measurements depend on, as JSON takes it."""
        read = [fitted.checksum, self.request.calibration_tokens, self.request.calibration_length]
        return {
            "source": opened.name,
            "weights": _checksums(opened, scored) if opened.loaded else fingerprint(opened.name),
            "plan": asdict(plan),
            "text": scored.checksum,
            "calibration": read,
            "healing": None if healing is None else [healing.recipe.model_dump(mode="json"), list(healing.rates)],
            "training texts": {n: checksum(Path(n)) for n in texts_of(healing.recipe)} if healing is not None else {},
            "bos": self.request.bos,
        }

    def about(self, opened: OpenModel, plan: ComparisonPlan, scored: Text, fitted: Text) -> dict[str, Any]:
        """What the report says of the comparison, beside its figures."""
        healed = self.request.heal or 0
        trained = {"heal": healed, "seeds": self.request.seeds if healed else 1}
        return {
            "command": self.command,
            "source": opened.name,
            "mechanism": family_of(opened.network.config).mechanism,
            "text": scored.name,
            "plan": {**asdict(plan), "calibration": fitted.name, **trained},
            "seconds": time.perf_counter() - self.start,
        }


def _check_long_enough(plan: ComparisonPlan, text: str, documents: Sequence[Tensor]) -> None:
    """ConfigError where no window of the target fits into the text that is read."""
    longest = max(map(len, documents))
    if min(longest, plan.tokens) < plan.target:
        raise ConfigError(
            f"--target-length {plan.target}: the longest document of {text} has {longest} tokens, and {plan.tokens} "
            "tokens are read: give longer text, more --tokens or a shorter target"
        )


def _checksums(opened: OpenModel, text: Text) -> dict[str, str]:
    """What tells a model in memory from another, and its tokenizer: a checksum of all tensors, of the config, and of
    the text as tokens."""
    tensors = opened.network.state_dict().values()
    data = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
    tokens = (ids.numpy().tobytes() for ids in tokenise(opened.tokenizer, text.documents))
    config = opened.network.config.to_json_string(use_diff=False).encode()
    return {"config": digest_of([config]), "tensors": digest_of(data), "tokens": digest_of(tokens)}


def _call(given: Mapping[str, Any]) -> str:
    """The call of `compare` as a user types it, with the arguments that are not the defaults; documents in memory are
    only named."""
    shown = [repr(name_of(given["source"]))]
    for name, parameter in list(inspect.signature(compare).parameters.items())[1:]:
        value = given[name]
        if name in Request.__dataclass_fields__ and value != parameter.default:
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            in_memory = name in ("data", "calibration") and not isinstance(value, str)
            shown.append(f"{name}={'[...]' if in_memory else repr(value)}")
    return f"rpb_retrofit.compare({', '.join(shown)})"
