"""Looking up one of very many keys (Liu et al. 2023, "Lost in the Middle", arXiv:2307.03172)."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from rpb_retrofit.evaluation.tasks.task import WORDS, Task


def key_value(random: Random, depth: float) -> Task:
    """A context of nothing but ``"key": "value"`` lines; the one that is asked for is at ``depth``."""
    pairs = _pairs(random)
    key, value = next(pairs)
    return Task(
        introduction="Below is a list of keys and their values. I will ask you for one of them.",
        needles=[(depth, f'\n"{key}": "{value}"')],
        padding=(f'\n"{key}": "{value}"' for key, value in pairs),
        question=f'What is the value of the key "{key}" in the list above?',
        opening=f'"{key}": "',
        answer=value,
    )


def _pairs(random: Random) -> Iterator[tuple[str, str]]:
    """Pairs without end, no key twice."""
    seen = set()
    while True:
        key = f"{random.choice(WORDS)}-{random.randrange(1000, 10_000)}"
        if key not in seen:
            seen.add(key)
            yield key, str(random.randrange(10_000, 100_000))
