"""One number among others like it (RULER's multi-key needles, Hsieh et al. 2024, arXiv:2404.06654)."""

from __future__ import annotations

from random import Random

from rpb_retrofit.evaluation.tasks.task import MANY, Task, numbers, words


def multi_key(random: Random, depth: float) -> Task:
    """Several things have a secret number each, anywhere in the text; the one that is asked for is at ``depth``."""
    things, values = words(random, MANY), numbers(random, MANY)
    depths = [depth, *(random.random() for _ in things[1:])]
    needles = [f"\nThe secret number of the {t} is {v}.\n" for t, v in zip(things, values, strict=True)]
    return Task(
        introduction="Secret numbers of five digits are hidden in the text below. Remember them.",
        needles=list(zip(depths, needles, strict=True)),
        padding=None,
        question=f"What is the secret number of the {things[0]}, five digits that are hidden in the text above?",
        opening=f"The secret number of the {things[0]} is",
        answer=f" {values[0]}",
    )
