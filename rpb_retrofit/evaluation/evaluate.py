"""`rpb_retrofit.evaluate`: a model's loss by length and by position, its answers about a long context, its speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.inputs import (
    GivenModel,
    GivenText,
    check_bos,
    check_least,
    check_lengths,
    given_text,
    open_given,
)
from rpb_retrofit.evaluation.nll import LengthResult, Windows, check_ids, nll_at_length
from rpb_retrofit.evaluation.retrieval import Cell, cells, check_kind, make_items, measure
from rpb_retrofit.evaluation.speed import Skipped, SpeedResult, speed
from rpb_retrofit.text.tokens import bos_policy, tokenise


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured of one model.

    ``model`` and ``data``: what the model and the text are called. ``stride``: tokens from one window to the next;
    None: windows do not overlap. ``bos``: how windows begin, in words. ``tokens``: of text, at most. ``chat``: whether
    questions were asked as the tokenizer's chat template has it. ``lengths``: losses in nats a token. ``retrieval``:
    answers by kind, length and depth, which ``answers`` lists one by one. ``speed``: by length.
    """

    model: str
    data: str
    stride: int | None
    bos: str
    tokens: int
    chat: bool
    lengths: list[LengthResult]
    retrieval: list[Cell]
    answers: list[dict[str, Any]]
    speed: list[SpeedResult | Skipped]

    def as_json(self) -> dict[str, Any]:
        """All of it, as ``rpb evaluate --json`` writes it."""
        return {
            **{"model": self.model, "data": self.data, "stride": self.stride or "length"},
            **{"bos": self.bos, "tokens": self.tokens, "lengths": [asdict(length) for length in self.lengths]},
            **{"retrieval": [asdict(cell) for cell in self.retrieval], "answers": self.answers},
            "speed": [asdict(result) for result in self.speed],
        }


def evaluate(
    model: GivenModel,
    *,
    tokenizer: Any = None,
    data: GivenText = None,
    lengths: Sequence[int] = (512, 2048),
    tokens: int = 8192,
    stride: int = 0,
    bos: str = "auto",
    retrieval: Sequence[str] = (),
    depths: Sequence[float] = (0, 0.5, 1),
    items: int = 10,
    rounds: int = 0,
) -> EvaluationResult:
    """Measure a causal model on text.

    Args:
        model: a folder, a hub id or a GGUF file, which is opened on the accelerator where there is one; or a model in
            memory, which stays where it is, with its ``tokenizer``.
        data: a file (text, JSONL or Parquet with a column ``text``), a list of documents, or None: Python's help texts.
        lengths: tokens of the windows; ``tokens`` of text are scored at each, the same ones.
        stride: tokens from one window to the next; 0: windows do not overlap.
        bos: whether the BOS token begins every window: ``auto`` (where the tokenizer adds it), ``always``, ``never``.
        retrieval: kinds of questions about a long context (`evaluation.tasks.KINDS`), ``items`` of each at each of the
            lengths and ``depths`` (0 to 1).
        rounds: of timing at each length; 0: none.

    Raises ConfigError for settings that mean nothing, DataError for what cannot be scored, CheckpointError for what
    cannot be opened; each in one line.
    """
    wanted = check_lengths(lengths)
    _check(tokens, stride, min(wanted), bos, retrieval, items, rounds)
    text = given_text(data)
    with (opened := open_given(model, tokenizer)).evaluating() as network:
        documents, first = tokenise(opened.tokenizer, text.documents), bos_policy(opened.tokenizer, bos)
        check_ids(network, documents)
        asked = [
            item
            for kind in dict.fromkeys(retrieval)
            for item in make_items(kind, opened.tokenizer, documents, wanted, sorted({*depths}), items)
        ]
        results = [
            nll_at_length(network, documents, Windows(length, stride or length - (first is not None), first), tokens)
            for length in wanted
        ]
        answers = measure(network, asked)
        timed = speed({"model": network}, wanted, rounds=rounds)["model"] if rounds else []
    chat, policy = opened.tokenizer.chat_template is not None, _policy(first, opened.tokenizer)
    about = (opened.name, text.name, stride or None, policy, tokens, chat)
    return EvaluationResult(*about, results, cells(answers), answers, timed)


def _policy(first: int | None, tokenizer: Any) -> str:
    """How windows begin, in words."""
    return "no BOS" if first is None else f"BOS ({tokenizer.bos_token!r}) first in every window"


def _check(tokens: int, stride: int, shortest: int, bos: str, kinds: Sequence[str], items: int, rounds: int) -> None:
    """ConfigError for settings that mean nothing, before anything is loaded."""
    check_bos(bos)
    check_least(tokens=(tokens, 2), stride=(stride, 0), items=(items, 1), speed=(rounds, 0))
    if stride > shortest:
        raise ConfigError(f"--stride {stride}: it must lie between 1 and the shortest length, {shortest}")
    for kind in kinds:
        check_kind(kind)
