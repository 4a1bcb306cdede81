"""The source as it is."""

from __future__ import annotations

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation


def _leave(model: PreTrainedModel, situation: Situation) -> str:
    return "nothing to do"


ARM = Arm("source", "the source as it is", _leave)
