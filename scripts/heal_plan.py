"""What scripts/heal.py does: the arms, and how each is made, trained and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import rpb_retrofit as rpb
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.training.recipe import Data, Recipe, Stage

SOURCE = "source"

KEPT, FULL = {"keep_frequencies": "auto"}, {"calibrate": CONTENT}
SETTINGS: dict[str, dict[str, Any]] = {
    "kept-flat": {**KEPT, "tail": "flat"},
    "kept-log": {**KEPT, "tail": "log"},
    "full-flat": {**FULL, "tail": "flat"},
    "full-log": {**FULL, "tail": "log"},
}
ABOUT = {
    SOURCE: "the source as it is, which is also the control",
    "kept-flat": "RoPE's high frequencies kept, buckets to the context, then constant",
    "kept-log": "RoPE's high frequencies kept, buckets to a quarter of the context, then falling with the logarithm",
    "full-flat": "no rotation, factors on the content, buckets to the context, then constant",
    "full-log": "no rotation, factors on the content, buckets to a quarter of the context, then falling",
}

BUCKETS = 64
"""Scalars a head, where the maximum distance is no less."""

LAST = 512
"""Positions at the end of a window that are scored at several times the context; no more than half the context."""


@dataclass(frozen=True)
class HealingPlan:
    """What is done to every arm. ``length`` is the context that is trained, in tokens; ``times`` it are the longer
    windows.

    ``tokens`` of training; ``calibration`` tokens; ``windows`` of the context that are scored inside it; ``ends`` of
    windows that are scored at all lengths; ``items`` of each kind of question, depth and length.
    """

    source: str
    data: tuple[str, ...]
    held_out: tuple[str, ...]
    length: int = 8192
    times: tuple[int, ...] = (2, 4, 8)
    tokens: int = 5_000_000
    batch_tokens: int = 16_384
    rate: float = 3e-4
    table_rate: float = 1e-2
    precision: str = "bf16"
    calibration: int = 16_384
    windows: int = 24
    ends: int = 16
    items: int = 2
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Of the context, and of several times it."""
        return [self.length, *(times * self.length for times in self.times)]

    @property
    def last(self) -> int:
        """Positions that are scored at the end of a window."""
        return min(LAST, self.length // 2)

    @property
    def recipe(self) -> Recipe:
        """Distillation of the source at its own context."""
        steps = -(-self.tokens // self.batch_tokens)
        stage = Stage(
            tokens=self.tokens,
            rate=self.rate,
            table_rate=self.table_rate,
            lengths={self.length: 1.0},
            warmup=0.05,
        )
        return Recipe.model_validate(
            {
                "stages": [stage],
                "data": [Data(name=name) for name in self.data],
                "batch_tokens": self.batch_tokens,
                "micro_tokens": self.length,
                "precision": self.precision,
                "seed": self.seed,
                "save_every": 10**9,
                "evaluate_every": max(1, steps // 4),
                "evaluate_tokens": 2 * self.length,
                "trackers": [],
            }
        )

    def config(self, arm: str) -> rpb.RetrofitConfig:
        """What an arm is. A tail that falls begins well inside the context, where its slope is fitted and trained."""
        settings = SETTINGS[arm]
        distance = self.length // 4 if settings["tail"] == "log" else self.length
        return rpb.RetrofitConfig(
            relative_attention_num_buckets=min(BUCKETS, distance),
            relative_attention_max_distance=distance,
            seed=self.seed,
            **settings,
        )
