"""What a recommendation is made from: candidates with their figures, and what the user cannot do without."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.statistics import Difference


@dataclass(frozen=True)
class Candidate:
    """An arm after a budget of training, with the figures that a choice rests on.

    ``loss``: at the target length, in nats a token. ``kept``: what it loses inside the context above its reference, in
    nats a token; None: it is the reference. ``slowdown``: its time over the source's; None: not measured. ``tokens``:
    how many it was trained on. ``seconds``: of calibration and training. ``broken``: why it can't be recommended at
    all. ``retrieval``: share of questions answered right. ``memory``: peak, over the source's.
    """

    name: str
    loss: float
    kept: Difference | None
    slowdown: float | None
    tokens: int
    seconds: float
    broken: str | None = None
    retrieval: float | None = None
    memory: float | None = None

    @property
    def fault(self) -> str | None:
        """Why no constraint can make it the answer."""
        if self.broken is None and not math.isfinite(self.loss):
            return f"its loss at the target is {self.loss}"
        return self.broken


@dataclass(frozen=True)
class Figures:
    """What was measured: the ``candidates``, the source first, and their ``differences`` at ``target`` tokens.

    ``differences[a, b]`` is how much more ``b`` loses than ``a``, in nats a token; one order of each pair is enough.
    """

    target: int
    candidates: tuple[Candidate, ...]
    differences: Mapping[tuple[str, str], Difference]

    @property
    def source(self) -> Candidate:
        """The model as it is."""
        return self.candidates[0]

    def difference(self, a: Candidate, b: Candidate) -> Difference:
        """How much more ``b`` loses than ``a`` at the target, in nats a token."""
        if (difference := self.differences.get((a.name, b.name))) is not None:
            return difference
        difference = self.differences[b.name, a.name]
        return replace(difference, mean=-difference.mean, low=-difference.high, high=-difference.low)

    def beats(self, a: Candidate, b: Candidate) -> bool:
        """Whether ``a`` really loses less than ``b`` at the target."""
        return a.loss < b.loss and self.difference(a, b).real


@dataclass(frozen=True)
class Constraints:
    """What the user can't do without; None: no such constraint.

    ``max_slowdown``: most time, in times the source's. ``train_tokens``: most tokens to train on. ``must_keep``: most
    nats a token that may be lost inside the context. ConfigError for a value that means nothing.
    """

    max_slowdown: float | None = None
    train_tokens: int | None = None
    must_keep: float | None = None

    def __post_init__(self) -> None:
        if (slowdown := self.max_slowdown) is not None and not 0 < slowdown < math.inf:
            raise ConfigError(f"--max-slowdown {slowdown}: give times the source's time, above 0, such as 1.05")
        if (tokens := self.train_tokens) is not None and not 0 <= tokens < math.inf:
            raise ConfigError(f"--train-tokens {tokens}: give a number of tokens, 0 for no training")
        if (keep := self.must_keep) is not None and not 0 <= keep < math.inf:
            raise ConfigError(f"--must-keep {keep}: give the nats a token that may be lost, 0 or more, such as 0.02")
