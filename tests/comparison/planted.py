"""Planted figures, that a recommendation is made from."""

from __future__ import annotations

import itertools
from typing import Any

from rpb_retrofit.comparison.candidates import Candidate, Figures
from rpb_retrofit.evaluation.statistics import Difference

TARGET = 16384
SIGHT = 0.05
"""Nats from which on planted differences are real."""


def difference(mean: float, real: bool, width: float = 0.01) -> Difference:
    return Difference(mean, mean - width, mean + width, 0.001 if real else 0.5, SIGHT, 16000, 120)


def arm(
    name: str, loss: float, kept: float | None = 0.0, slowdown: float | None = 1.0, tokens: int = 0, **more: Any
) -> Candidate:
    inside = None if kept is None else difference(kept, kept > 0.005, 0.005)
    return Candidate(name, loss, inside, slowdown, tokens, 40.0, **more)


def figures(*candidates: Candidate, sight: float = SIGHT) -> Figures:
    """Whatever differs by ``sight`` nats or more is real. What is broken was not compared."""
    pairs = itertools.combinations([c for c in candidates if not c.broken], 2)
    differences = {(a.name, b.name): difference(b.loss - a.loss, abs(b.loss - a.loss) >= sight) for a, b in pairs}
    return Figures(TARGET, candidates, differences)
