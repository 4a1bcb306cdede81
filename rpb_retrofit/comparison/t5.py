"""What the arms with a T5 bias have in common: each is a configuration of `rpb_retrofit.retrofit`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation, share
from rpb_retrofit.config import RetrofitConfig, command_of
from rpb_retrofit.swap.inplace import retrofit
from rpb_retrofit.tables import CONTENT

BUCKETS = 64
"""Scalars a head where the buckets go beyond T5's own reach."""

SHORTEST_TAIL = 32
"""Where a logarithmic tail begins at the earliest, in tokens: T5's 32 buckets are one offset each up to there."""


def tail_begins(reach: int) -> int:
    """Where a logarithmic tail begins, in tokens, so that texts of ``reach`` tokens fit and train its slope."""
    return max(reach // 4, SHORTEST_TAIL)


def t5_arm(name: str, about: str, usual: bool = True, number: str = "", **settings: Any) -> Arm:
    """An arm that retrofits: T5's buckets to the longest window that calibration saw, and ``settings``.

    A logarithmic tail begins at a quarter of that, so that its slope is fitted, and trained, before it leads beyond.
    A ``number`` means the frequencies that are kept.
    """

    def apply(model: PreTrainedModel, situation: Situation) -> str:
        given = dict(settings)
        if situation.number is not None:
            given["keep_frequencies"] = int(situation.number)
        usual_reach = RetrofitConfig.relative_attention_max_distance
        log = given.get("tail") == "log"
        distance = tail_begins(situation.reach) if log else max(situation.reach, usual_reach)
        if distance > usual_reach:
            given["relative_attention_num_buckets"] = BUCKETS
        config = RetrofitConfig(relative_attention_max_distance=distance, **given)
        retrofit(model, config, calibration=situation.windows if config.takes_text else None)
        share(model, situation.source)
        return command_of(vars(config))

    return Arm(name, about, apply, number, rewrites=settings.get("calibrate") == CONTENT, usual=usual)
