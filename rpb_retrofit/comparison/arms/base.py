"""RoPE with another base, which the user names. Xiong et al. 2023, arXiv:2309.16039, chose 500,000 for 10,000."""

from __future__ import annotations

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation
from rpb_retrofit.comparison.rope import rotate_by


def _rebase(model: PreTrainedModel, situation: Situation) -> str:
    return rotate_by(model, situation, lambda base, context, rotating: {"rope_theta": situation.number})


ARM = Arm("base", "RoPE with another base", _rebase, number="the base", needed=True, usual=False)
