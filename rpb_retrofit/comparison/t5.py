"""What the arms with a T5 bias have in common: each is a configuration of `rpb_retrofit.retrofit`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation, share
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.inplace import retrofit
from rpb_retrofit.tables import CONTENT

BUCKETS = 64
"""Scalars a head where the reach goes beyond T5's own."""


def t5_arm(name: str, about: str, usual: bool = True, number: str = "", **settings: Any) -> Arm:
    """An arm that retrofits: T5's buckets to the longest window that calibration saw, and ``settings``.

    A ``number`` means the frequencies that are kept.
    """

    def apply(model: PreTrainedModel, situation: Situation) -> str:
        given = dict(settings)
        if situation.number is not None:
            given["keep_frequencies"] = int(situation.number)
        plain = RetrofitConfig()
        reach = max(situation.reach, plain.relative_attention_max_distance)
        far = reach > plain.relative_attention_max_distance
        config = RetrofitConfig(
            relative_attention_num_buckets=BUCKETS if far else plain.relative_attention_num_buckets,
            relative_attention_max_distance=reach,
            **given,
        )
        retrofit(model, config, calibration=situation.windows if config.takes_text else None)
        share(model, situation.source)
        return f"rpb retrofit SOURCE OUT {_options(config)}"

    return Arm(name, about, apply, number, rewrites=settings.get("calibrate") == CONTENT, usual=usual)


def _options(config: RetrofitConfig) -> str:
    """The command line of a config."""
    plain, short = RetrofitConfig(), {"relative_attention_num_buckets": "buckets"}
    short["relative_attention_max_distance"] = "max-distance"
    changed = {k: v for k, v in vars(config).items() if v != getattr(plain, k)}
    return " ".join(f"--{short.get(name, name.replace('_', '-'))} {value}" for name, value in changed.items())
