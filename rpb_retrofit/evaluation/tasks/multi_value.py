"""Several numbers under one key (RULER's multi-value needles, arXiv:2404.06654)."""

from __future__ import annotations

from random import Random

from rpb_retrofit.evaluation.tasks.task import MANY, Task, listed, numbers, spread, words


def multi_value(random: Random) -> Task:
    """One thing has several secret numbers, anywhere in the text; all are asked for, in the text's order."""
    (thing,), values = words(random, 1), numbers(random, MANY)
    return Task(
        introduction="Secret numbers of five digits are hidden in the text below. Remember them.",
        needles=spread(random, [f"\nA secret number of the {thing} is {value}.\n" for value in values]),
        padding=None,
        question=(
            f"What are the {MANY} secret numbers of the {thing} that are hidden in the text above? "
            "List them in the order of the text."
        ),
        opening=f"The secret numbers of the {thing} are",
        answer=f" {listed(values)}",
    )
