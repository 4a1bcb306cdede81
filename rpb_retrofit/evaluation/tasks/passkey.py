"""One number in a long text (Mohtashami and Jaggi 2023, arXiv:2305.16300)."""

from __future__ import annotations

from random import Random

from rpb_retrofit.evaluation.tasks.task import Task, numbers


def passkey(random: Random, depth: float) -> Task:
    """The text holds one pass key, at ``depth``."""
    (key,) = numbers(random, 1)
    return Task(
        introduction="A pass key, a number of five digits, is hidden in the text below. Remember it.",
        needles=[(depth, f"\nThe pass key is {key}. Remember it: {key} is the pass key.\n")],
        padding=None,
        question="What is the pass key, the number of five digits that is hidden in the text above?",
        opening="The pass key is",
        answer=f" {key}",
    )
