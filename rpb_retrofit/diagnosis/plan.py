"""How much a diagnosis measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiagnosisPlan:
    """How much is measured. ``lengths``: context lengths, ascending. ``tokens``: of text, the same at every length.
    ``probed``: tokens that an intervention is scored on. ``items``: of each kind of question, at each length and
    depth. ``rounds``: of timing. ``seed``: of the questions."""

    lengths: tuple[int, ...] = (128, 512, 2048)
    tokens: int = 4096
    probed: int = 2048
    items: int = 4
    rounds: int = 3
    seed: int = 0
