"""Faults of how the model runs: its attention, its cache path, its masks, its config."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.runtime import interface
from rpb_retrofit.runtime.anatomy import submodels
from rpb_retrofit.runtime.attach import drop_scale
from rpb_retrofit.runtime.families import UNSCALED
from rpb_retrofit.runtime.mechanisms import position_zero, remove_hooks
from tests.diagnosis.faults.planting import EVERYWHERE, answer, fault, layers, reloaded, root, tables
from tests.diagnosis.small_model import retrofitted


@fault("RoPE goes on", "mechanism_active", **EVERYWHERE)
def rope_goes_on(arms: Arms, count: int | None) -> None:
    model: Any = arms.retrofit
    rotary = model.model.rotary_emb
    if count is None:
        remove_hooks(rotary, position_zero)
        return

    def rotated(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        positions = torch.arange(hidden.shape[1])[None]
        return args, {**kwargs, "position_embeddings": rotary.forward(hidden, positions)}

    layers(arms, count)[0].register_forward_pre_hook(rotated, with_kwargs=True)


@fault("offset reversed", "offset_reversed", **EVERYWHERE)
def offset_reversed(arms: Arms, count: int | None) -> None:
    answer(arms, lambda bias, offset: bias(-offset), count)


@fault("offset off by one", "off_by_one", **EVERYWHERE)
def off_by_one(arms: Arms, count: int | None) -> None:
    answer(arms, lambda bias, offset: bias(offset + 1), count)


@fault("bias scaled by 1/sqrt(d)", "wrong_scale", **EVERYWHERE)
def bias_scaled(arms: Arms, count: int | None) -> None:
    answer(arms, lambda bias, offset: bias(offset) / root(arms), count)


@fault("content not scaled", "wrong_scale", **EVERYWHERE)
def content_unscaled(arms: Arms, count: int | None) -> None:
    for module in layers(arms, count):
        module.scaling = 1.0


@fault("query projection times sqrt(d)", "wrong_scale", **EVERYWHERE)
def query_projection_scaled(arms: Arms, count: int | None) -> None:
    for module in layers(arms, count):
        module.q_proj.weight.data *= root(arms)


@fault("scale said to be in the weights, where it is not", "wrong_scale")
def unfolded_scale(arms: Arms) -> None:
    for attention in arms.attentions.values():
        drop_scale(attention)
    for submodel in submodels(arms.retrofit):
        submodel.config.rpb_retrofit = {**submodel.config.rpb_retrofit, "scale": UNSCALED}


@fault("tables times 1/sqrt(d) in the file", "wrong_scale", **EVERYWHERE)
def tables_scaled(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data /= root(arms)


@fault("tables halved", "wrong_scale", **EVERYWHERE)
def tables_halved(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data /= 2


@fault("bias dropped: another implementation is set", "bias_dropped")
def other_implementation(arms: Arms) -> None:
    arms.retrofit.config._attn_implementation = "sdpa"


@fault("bias dropped: another implementation, and its guard removed", "bias_dropped")
def other_implementation_unguarded(arms: Arms) -> None:
    arms.retrofit.config._attn_implementation = "sdpa"
    for module in arms.attentions.values():
        remove_hooks(module, interface.pass_offset)


@fault("bias dropped: zero answers", "bias_dropped", **EVERYWHERE)
def zero_answers(arms: Arms, count: int | None) -> None:
    answer(arms, lambda bias, offset: bias(offset) * 0, count)


@fault("cached decoding counts from the cache's start", "cached_decoding")
def cached_row_shifted(arms: Arms) -> None:
    for bias in arms.biases.values():
        row = type(bias)._row
        bias._row = lambda keys, weight, bias=bias, row=row: row(bias, keys, weight).roll(1, 1)


@fault("cached decoding sees far keys as near", "cached_decoding")
def cached_row_constant(arms: Arms) -> None:
    for bias in arms.biases.values():
        bias._row = lambda keys, weight, bias=bias: bias.weight[:, :1].expand(-1, keys)


@fault("a static cache's unused slots are counted", "cached_decoding")
def static_cache_offset(arms: Arms) -> None:
    def late(module: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("first_offset") is not None:
            kwargs = {**kwargs, "first_offset": kwargs["first_offset"] + 5}
        return args, kwargs

    for module in arms.attentions.values():
        module.register_forward_pre_hook(late, with_kwargs=True)


@fault("the next token is seen", "sees_the_future", **EVERYWHERE)
def next_token_seen(arms: Arms, count: int | None) -> None:
    def leaking(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        run = torch.stack([torch.zeros(length), (torch.arange(length) + 2).clamp(max=length)], 1).int()
        return args, {**kwargs, "attention_mask": run[None, None] if length > 1 else kwargs["attention_mask"]}

    for module in layers(arms, count):
        module.rpb_causal = False
        module.is_causal = False
        module.register_forward_pre_hook(leaking, with_kwargs=True)


@fault("padding is seen", "padding_or_packing")
def padding_seen(arms: Arms) -> None:
    def unmasked(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": None}

    arms.retrofit.base_model.register_forward_pre_hook(unmasked, with_kwargs=True)


@fault("a mask overflows where there is padding", "not_finite")
def mask_overflows(arms: Arms) -> None:
    def overflow(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return output if kwargs.get("attention_mask") is None else (output[0] * math.nan, *output[1:])

    for module in arms.attentions.values():
        module.register_forward_hook(overflow, with_kwargs=True)


@fault("packed documents see one another", "padding_or_packing")
def packing_seen(arms: Arms) -> None:
    def unpacked(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_ids": None}

    arms.retrofit.base_model.register_forward_pre_hook(unpacked, with_kwargs=True)


@fault("YaRN was left in the config", "position_scaling", **{"of 4": 4.0, "of 1.5": 1.5})
def yarn_left(arms: Arms, factor: float) -> Arms:
    config = arms.retrofit.config
    context, theta = config.max_position_embeddings, config.rope_parameters["rope_theta"]
    rope = {"rope_type": "yarn", "factor": factor, "rope_theta": theta, "original_max_position_embeddings": context}
    return replace(arms, retrofit=reloaded(arms.retrofit, rope_parameters=rope))


@fault("RoPE's base was changed, under kept frequencies", "position_scaling")
def base_changed(arms: Arms) -> Arms:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return replace(arms, retrofit=reloaded(retrofitted(arms.source, keep=4), rope_parameters=rope))


def hooked(module: Any, factor: float) -> None:
    module.register_forward_hook(lambda module, args, output: output * factor)


@fault("values are halved on the way", "computes_otherwise")
def values_halved(arms: Arms) -> None:
    hooked(layers(arms, 1)[0].v_proj, 0.5)


@fault("queries are a tenth too large", "computes_otherwise")
def queries_larger(arms: Arms) -> None:
    hooked(layers(arms, 2)[1].q_proj, 1.1)


@fault("dropout was left on", "not_deterministic")
def dropout_left_on(arms: Arms) -> None:
    arms.retrofit.base_model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: torch.nn.functional.dropout(output, 0.1)
    )


@fault("the bias goes wrong far away", "computes_otherwise")
def wrong_far_away(arms: Arms) -> None:
    answer(arms, lambda bias, offset: bias(torch.where(offset > 64, offset + 40, offset)))


@fault("decoding goes wrong late", "cached_decoding")
def wrong_late(arms: Arms) -> None:
    for bias in arms.biases.values():
        row = type(bias)._row
        bias._row = lambda keys, weight, bias=bias, row=row: row(bias, keys, weight) * (1 if keys < 100 else 0)
