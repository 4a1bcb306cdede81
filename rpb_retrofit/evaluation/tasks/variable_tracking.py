"""A value handed from variable to variable (RULER's variable tracking, arXiv:2404.06654)."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

from rpb_retrofit.evaluation.tasks.task import MANY, Task, listed, numbers, spread


def variable_tracking(random: Random) -> Task:
    """Two chains of assignments, anywhere in the text and in each other; asked for are the variables of one of them,
    in the chain's order."""
    pairs = [first + second for first in ascii_uppercase for second in ascii_uppercase]
    names = random.sample(pairs, 2 * MANY)
    chains, values = [names[:MANY], names[MANY:]], numbers(random, 2)
    links = [_assignments(chain, value) for chain, value in zip(chains, values, strict=True)]
    turns = random.sample([0] * MANY + [1] * MANY, 2 * MANY)
    needles = [links[turn][turns[:i].count(turn)] for i, turn in enumerate(turns)]
    return Task(
        introduction="Assignments to variables are hidden in the text below. Keep track of them, I will ask about one.",
        needles=spread(random, needles),
        padding=None,
        question=(
            f"Which {MANY} variables have the value {values[0]} according to the text above, as it was assigned or "
            "passed on? Answer in one sentence in the order of the text."
        ),
        opening=f"The variables that have the value {values[0]} are",
        answer=f" {listed(chains[0])}",
    )


def _assignments(chain: list[str], value: str) -> list[str]:
    sources = [value, *chain[:-1]]
    return [f"\nThe variable {name} = {source}.\n" for name, source in zip(chain, sources, strict=True)]
