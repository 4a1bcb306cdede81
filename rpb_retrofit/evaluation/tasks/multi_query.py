"""Several keys asked for at once (RULER's multi-query needles, arXiv:2404.06654)."""

from __future__ import annotations

from random import Random

from rpb_retrofit.evaluation.tasks.task import MANY, Task, listed, numbers, spread, words


def multi_query(random: Random) -> Task:
    """Several things have a secret number each, anywhere in the text; all but one are asked for, in another order."""
    values = dict(zip(words(random, MANY), numbers(random, MANY), strict=True))
    asked = random.sample(list(values), MANY - 1)
    things = listed([f"the {thing}" for thing in asked])
    return Task(
        introduction="Secret numbers of five digits are hidden in the text below. Remember them.",
        needles=spread(random, [f"\nThe secret number of the {t} is {v}.\n" for t, v in values.items()]),
        padding=None,
        question=(
            f"What are the secret numbers of {things} that are hidden in the text above? List them in this order."
        ),
        opening=f"The secret numbers of {things} are",
        answer=f" {listed([values[thing] for thing in asked])}",
    )
