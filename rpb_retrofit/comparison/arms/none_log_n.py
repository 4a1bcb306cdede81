"""No positions, and scores that grow with the length beyond the context, so that attention does not spread.

The factor is 1 + c log(n / context) for a query that sees n keys. DroPE (arXiv:2512.12167) tunes such a temperature on
text; here c is 1 / log(context) unless the user says otherwise: the factor log n / log context, with which the entropy
of attention stays about the same (Chiang and Cholak 2022, arXiv:2202.12172).
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rpb_retrofit.comparison.arm import Arm, Situation
from rpb_retrofit.comparison.arms.none import drop
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy

FACTOR = "rpb_length_factor"
"""Attribute of a model's configs, the context and the coefficient; and the beginning of an attention's name."""


def attend_by_length(
    implementation: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The family's attention of that name, each query (batch, heads, Q, d) times the factor of the keys it sees."""
    context, coefficient = getattr(module.config, FACTOR)
    if key.shape[2] > context:
        seen = _seen(query, key, attention_mask)
        factor = 1 + coefficient * (seen / context).clamp(min=1).log()
        query = query * factor[..., None].to(query.dtype)
    if implementation == "eager":  # which every family writes for itself
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def _seen(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """How many keys each query sees, (Q,) or (batch, 1, Q)."""
    if mask is None:
        return torch.arange(key.shape[2] - query.shape[2] + 1, key.shape[2] + 1, device=query.device)
    return (mask if mask.dtype == torch.bool else mask == 0).sum(-1)


def _drop(model: PreTrainedModel, situation: Situation) -> str:
    if not situation.family.uses_interface:
        raise ConfigError("the source keeps its queries to itself: their scores cannot be scaled by length")
    told = drop(model, situation)
    coefficient = situation.number if situation.number is not None else 1 / math.log(situation.context)
    implementation = model.config._attn_implementation
    name = f"{FACTOR}_{implementation}"
    AttentionInterface.register(name, partial(attend_by_length, implementation))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    for config in Anatomy.of(model).configs:
        setattr(config, FACTOR, (situation.context, coefficient))
        config._attn_implementation = name
    return f"{told}, and queries times 1 + {coefficient:.3f} log(n / {situation.context}) beyond the context"


ARM = Arm(
    "none-log-n",
    "the source's positions dropped, and scores that grow with the logarithm of the length beyond the context (DroPE's "
    "length factor, arXiv:2512.12167)",
    _drop,
    number="coefficient",
)
