"""Which words of a list are the most frequent (RULER's common words, arXiv:2404.06654)."""

from __future__ import annotations

from itertools import cycle
from random import Random

from rpb_retrofit.evaluation.tasks.task import WORDS, Task, listed, words

_TIMES = (4, 3, 2)
"""How often the common words occur, relative to each other: their order is what the answer's order is."""

_STRETCH = 128
"""Tokens of the item for each time: with two tokens to a word common words are a seventh of the list, and the least
frequent of them occurs about six times as often as any other word."""


def common_words(random: Random, length: int) -> Task:
    """A list of words in which three occur much more often; these are asked for, the most frequent first."""
    shuffled = words(random, len(WORDS))
    common, others = shuffled[: len(_TIMES)], shuffled[len(_TIMES) :]
    repeats = max(1, length // _STRETCH)
    occurrences = [word for word, times in zip(common, _TIMES, strict=True) for _ in range(times * repeats)]
    return Task(
        introduction="Below is a list of words. A few of them occur much more often than all others.",
        needles=[(random.random(), f" {word}") for word in occurrences],
        padding=(f" {word}" for word in cycle(others)),
        question=(
            f"What are the {len(_TIMES)} most common words of the list above? "
            "Answer in one sentence, the most common first."
        ),
        opening="The most common words are",
        answer=f" {listed(common)}",
    )
