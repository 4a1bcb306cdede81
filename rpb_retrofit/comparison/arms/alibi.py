"""ALiBi, exactly, on the engine that the T5 bias runs on. Press et al. 2022, arXiv:2108.12409."""

from __future__ import annotations

from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation
from rpb_retrofit.config import RetrofitConfig, command_of
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.bias import AlibiBias
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.swap.inplace import retrofit
from rpb_retrofit.tables.alibi import slopes


def _penalise(model: PreTrainedModel, situation: Situation) -> str:
    if situation.family.mechanism == "alibi":
        raise ConfigError("the source has ALiBi already")
    retrofit(model, RetrofitConfig(init="zeros"))
    anatomy = Anatomy.of(model)
    for name, module in anatomy.attentions.items():
        setattr(module, TABLE, AlibiBias(slopes(anatomy.facts(name).heads)).to(model.device))
    nearest = RetrofitConfig(
        init="alibi", relative_attention_num_buckets=64, relative_attention_max_distance=situation.target
    )
    return f"nearest as a checkpoint: {command_of(vars(nearest))}"


ARM = Arm(
    "alibi",
    "a penalty that grows with the distance, at fixed slopes, in the place of the source's positions "
    "(ALiBi, arXiv:2108.12409)",
    _penalise,
)
