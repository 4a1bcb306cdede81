"""A task as tokens: the prompt as a chat or a base model expects it, and around what lies in the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.chat import render
from rpb_retrofit.evaluation.tasks.task import Task
from rpb_retrofit.text.tokens import special_tokens

_CONTEXT = "\ue000"
"""Stands for the context while the rest is written: a character for private use, in no text of ours."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a task but for the context, which lies between ``before`` and ``after``."""

    before: list[int]
    after: list[int]
    answer: list[int]
    needles: list[tuple[float, list[int]]]

    @property
    def size(self) -> int:
        """Tokens of all of it."""
        needles = sum(len(ids) for _, ids in self.needles)
        return len(self.before) + len(self.after) + len(self.answer) + needles

    def around(self, padding: Sequence[list[int]]) -> list[int]:
        """All token ids up to the answer, with the needles put between pieces of ``padding`` as their depths say."""
        context = list(padding)
        for before, (depth, ids) in enumerate(sorted(self.needles, key=lambda needle: needle[0])):
            context.insert(round(depth * len(padding)) + before, ids)
        return [*self.before, *chain.from_iterable(context), *self.after]


def write(tokenizer: Any, task: Task) -> Prompt:
    """A user's message and the beginning of the assistant's where the tokenizer has a chat template, else plain text.

    Raises DataError where the chat template cannot be rendered, or the tokenizer cannot spell the answer.
    """
    message = f"{task.introduction}\n{_CONTEXT}\n\n{task.question}"
    if tokenizer.chat_template is None:
        special = special_tokens(tokenizer)[0].tolist()
        text = f"{message}\n"
    else:
        special = []  # the template writes them out
        text = render(tokenizer, message)
        if (times := text.count(_CONTEXT)) != 1:
            raise DataError(
                f"the chat template of '{tokenizer.name_or_path}' writes a user's message {times} times, not once: "
                "take chat_template out of the tokenizer's files, and plain prompts are asked"
            )
    before, _, after = f"{text}{task.opening}".partition(_CONTEXT)
    # Together, as in running text, where a space belongs to the word after it; what the answer changes is the answer.
    (prompt, whole), end = _inside(tokenizer, [after, after + task.answer]), 0
    while end < min(len(prompt), len(whole)) and prompt[end] == whole[end]:
        end += 1
    answer = whole[end:]
    if not answer or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in answer):
        raise DataError(f"the tokenizer cannot spell '{task.answer.strip()}': retrieval needs one made for text")
    depths, needles = [depth for depth, _ in task.needles], [text for _, text in task.needles]
    return Prompt(
        before=special + tokenizer(before, add_special_tokens=False)["input_ids"],
        after=whole[:end],
        answer=answer,
        needles=list(zip(depths, _inside(tokenizer, needles), strict=True)),
    )


def fill(tokenizer: Any, texts: Iterator[str], room: int) -> list[list[int]]:
    """Pieces of token ids, ``room`` together: the last is cut short."""
    parts: list[list[int]] = []
    while room:
        for ids in _inside(tokenizer, list(islice(texts, 64))):
            if room:
                parts.append(ids[:room])
                room -= len(parts[-1])
    return parts


def _inside(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as they are after other text: some tokenizers write a space before the first word of all."""
    (anchor,) = tokenizer(["a"], add_special_tokens=False)["input_ids"]
    encoded = tokenizer([f"a{text}" for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    if all(ids[: len(anchor)] == anchor for ids in encoded):
        return [ids[len(anchor) :] for ids in encoded]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
