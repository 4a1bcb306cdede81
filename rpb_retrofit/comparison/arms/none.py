"""No positions: the source's mechanism off, and nothing in its place.

Kazemnejad et al. 2023, arXiv:2305.19466; dropped after training: DroPE, Gelberg et al. 2025, arXiv:2512.12167.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation
from rpb_retrofit.config import RetrofitConfig, command_of
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.mechanisms import neutralise
from rpb_retrofit.swap.inplace import retrofit

ZEROS = RetrofitConfig(init="zeros")
"""A bias of zero: the nearest to no positions that a checkpoint can hold."""


def drop(model: PreTrainedModel, situation: Situation) -> str:
    """Switch the mechanism off; where it lives in the attention itself (ALiBi), by a bias of zero."""
    if situation.family.positions:
        neutralise(Anatomy.of(model), {}, [])
        if situation.family.mechanism != "rope":  # every length has the same vectors now
            model.config.max_position_embeddings = max(situation.target, situation.context)
    else:
        retrofit(model, ZEROS)
    return command_of(vars(ZEROS))


ARM = Arm("none", "the source's positions dropped, nothing in their place (as DroPE, arXiv:2512.12167)", drop)
