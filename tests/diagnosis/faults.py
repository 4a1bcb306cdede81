"""Faults to plant in a healthy retrofit: in its weights, config, cache path, mask or data; each with its true name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.runtime import interface
from rpb_retrofit.runtime.anatomy import submodels
from rpb_retrofit.runtime.attach import drop_scale
from rpb_retrofit.runtime.families import UNSCALED
from rpb_retrofit.runtime.mechanisms import position_zero, remove_hooks
from tests.diagnosis.small_model import language, plain_language, retrofitted, train, trained


@dataclass(frozen=True)
class Fault:
    """``plant`` spoils a healthy retrofit in place, or gives other arms; ``cause`` is the hypothesis that has to name
    it first, where a text of the language is read at ``lengths``."""

    name: str
    cause: str
    plant: Callable[[Arms], Arms | None]
    lengths: tuple[int, ...] = (64, 256)
    text: Callable[[int, int], Tensor] = language

    def __str__(self) -> str:
        return self.name


FAULTS: list[Fault] = []


def fault(name: str, cause: str, measurements: dict[str, Any] | None = None, **severities: Any) -> Callable[[Any], Any]:
    """Register a function as one fault, or as one for each severity."""

    def register(plant: Any) -> Any:
        if not severities:
            FAULTS.append(Fault(name, cause, plant, **(measurements or {})))
        for how, value in severities.items():
            FAULTS.append(
                Fault(f"{name}, {how}", cause, lambda arms, value=value: plant(arms, value), **(measurements or {}))
            )
        return plant

    return register


EVERYWHERE: dict[str, Any] = {"in all layers": None, "in one layer": 1}
"""The two severities of what a layer can have."""


def tables(arms: Arms, count: int | None = None) -> list[nn.Parameter]:
    return [bias.weight for bias in _some(arms.biases.values(), count)]


def layers(arms: Arms, count: int | None) -> list[Any]:
    return _some(arms.attentions.values(), count)


def _some(things: Any, count: int | None) -> list[Any]:
    """All of a list by layers, or so many from its first third on."""
    things = list(things)
    return things if count is None else things[len(things) // 3 :][:count]


def root(arms: Arms) -> float:
    """sqrt(d) of a head."""
    config = arms.retrofit.config
    return math.sqrt(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def reloaded(model: Any, **settings: Any) -> Any:
    """A retrofit, saved, its config.json changed, and loaded again."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
        return rpb.load(folder).eval()


def answer(arms: Arms, change: Callable[[Any, Any], Any], count: int | None = None) -> None:
    """Every bias module (of the first ``count`` layers) answers ``change(module, offsets)``."""
    for module in layers(arms, count):
        bias = module.relative_attention_bias
        inner = type(bias).forward
        bias.forward = lambda offset, bias=bias, inner=inner: change(
            lambda o: inner(bias, o), torch.tensor(list(offset)) if isinstance(offset, range) else offset
        )


# --- the running model ---------------------------------------------------------------------------------------------


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


# --- the numbers ---------------------------------------------------------------------------------------------------


@fault("tables not loaded: zeros", "tables_not_loaded", **EVERYWHERE)
def tables_zero(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.zero_()


@fault("tables not loaded: one number", "tables_not_loaded", **EVERYWHERE)
def tables_constant(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data[:] = table.data[:, :1]


@fault("all heads alike", "tables_not_loaded", **EVERYWHERE)
def heads_alike(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data[:] = table.data[:1]


@fault("tables of random numbers", "foreign_tables", **EVERYWHERE)
def tables_random(arms: Arms, count: int | None) -> None:
    for number, table in enumerate(tables(arms, count)):
        table.data.normal_(0, 2, generator=torch.Generator().manual_seed(number))


@fault("another layer's table", "tables_shared", **EVERYWHERE)
def tables_shared(arms: Arms, count: int | None) -> None:
    first = tables(arms)[-1].data.clone()
    for table in tables(arms, count):
        table.data.copy_(first)


@fault("one head's row upside down", "foreign_tables", **{"head 0": 0, "head 1": 1, "head 2": 2, "head 3": 3})
def row_flipped(arms: Arms, head: int) -> None:
    tables(arms)[len(tables(arms)) // 2].data[head] *= -1


@fault("heads in another order", "wrong_order", **{"rolled in all layers": None, "rolled in one layer": 1})
def heads_rolled(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.copy_(table.data.roll(1, 0))


@fault("layers in another order", "wrong_order", all=None, two=2)
def layers_reversed(arms: Arms, count: int | None) -> None:
    before = [table.data.clone() for table in tables(arms, count)]
    for table, other in zip(tables(arms, count), reversed(before), strict=True):
        table.data.copy_(other)


@fault("the maximum distance of the config was changed", "other_buckets", **{"to a quarter": 0.25, "to twice": 2})
def other_distance(arms: Arms, factor: float) -> Arms:
    distance = round(factor * arms.settings["relative_attention_max_distance"])
    settings = {**arms.settings, "relative_attention_max_distance": distance}
    return replace(arms, retrofit=reloaded(arms.retrofit, rpb_retrofit=settings))


@fault("sign of the tables reversed", "wrong_scale", **EVERYWHERE)
def tables_negated(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.neg_()


@fault("tables moved by one bucket", "off_by_one", **EVERYWHERE)
def tables_moved(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.copy_(torch.cat([table.data[:, :1], table.data[:, :-1]], 1))


@fault("tables rounded to bfloat16", "precision", **EVERYWHERE)
def tables_rounded(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.copy_(table.data.bfloat16().float())


@fault("tables cast to bfloat16", "precision", **EVERYWHERE)
def tables_cast(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data = table.data.bfloat16()


@fault("a weight is NaN", "not_finite")
def weight_nan(arms: Arms) -> None:
    next(arms.retrofit.parameters()).data[3, 3] = math.nan


@fault("a layer's weights are damaged", "weights_differ", **{"by noise": 0.5, "slightly": 0.02})
def weights_damaged(arms: Arms, size: float) -> None:
    weight = arms.retrofit.base_model.layers[1].mlp.up_proj.weight.data
    weight += size * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@fault("another model's retrofit", "weights_differ")
def another_model(arms: Arms) -> Arms:
    return replace(arms, retrofit=retrofitted(trained("llama", 5, first=0, then=40)))


@fault("kept frequencies of the config were dropped", "settings_differ", **{"all": 0, "half of them": 2})
def kept_dropped(arms: Arms, kept: int) -> Arms:
    retrofit = retrofitted(arms.source, keep=4)
    settings = {**retrofit.config.rpb_retrofit, "kept_frequencies": {"inv_freq": kept} if kept else {}}
    return replace(arms, retrofit=reloaded(retrofit, rpb_retrofit=settings))


@fault("an epsilon of the config is not the source's", "settings_differ")
def other_epsilon(arms: Arms) -> None:
    arms.retrofit.config.rms_norm_eps = 1e-2


@fault("a module's epsilon is not its config's", "settings_differ")
def other_module_epsilon(arms: Arms) -> None:
    for module in arms.retrofit.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-1


@fault("queries grow with position", "position_scaling")
def queries_grow(arms: Arms) -> None:
    def grow(module: Any, args: Any, output: Any) -> Any:
        return output * (1 + 0.1 * torch.arange(output.shape[1]).log1p())[None, :, None]

    for module in arms.attentions.values():
        module.q_proj.register_forward_hook(grow)


@fault("far buckets were not trained", "untrained_buckets", **{"they hold noise": 3.0, "they hold zeros": 0.0})
def far_buckets(arms: Arms, size: float) -> None:
    for number, table in enumerate(tables(arms)):
        far = table.data[:, table.shape[1] * 5 // 8 :]
        noise = torch.randn(far.shape, generator=torch.Generator().manual_seed(number))
        far.copy_(size * noise + (0 if size else table.data.amax()))


# --- the settings, and what training did ---------------------------------------------------------------------------


@fault("the tables were never fitted", "not_fitted", zeros="zeros", normal="normal", alibi="alibi")
def never_fitted(arms: Arms, init: str) -> Arms:
    model = deepcopy(arms.source)
    rpb.retrofit(model, rpb.RetrofitConfig(init=init))
    return replace(arms, retrofit=model)


@fault("the last bucket begins at 8", "far_order_lost")
def short_reach(arms: Arms) -> Arms:
    return replace(arms, retrofit=retrofitted(arms.source, buckets=10, max_distance=8))


@fault("two buckets for all that is near", "local_order_lost")
def wide_buckets(arms: Arms) -> Arms:
    return replace(arms, retrofit=retrofitted(arms.source, buckets=4, max_distance=256))


@fault("texts longer than frequencies that were kept", "outside_trained_length", {"lengths": (64, 256, 1024)})
def kept_frequencies(arms: Arms) -> Arms:
    return Arms(retrofitted(arms.source, keep=6))  # its source breaks there as well


@fault("training on far positions only", "short_context_forgotten")
def forgets_short(arms: Arms) -> Arms:
    train(arms.retrofit, language(60_000, 5), steps=60, worse_before=40)
    return arms


@fault("another language was trained", "domain_drift")
def another_language(arms: Arms) -> Arms:
    control = deepcopy(arms.source)
    other = language(60_000, 5, words=1234) % 24
    for model in (arms.retrofit, control):
        train(model, other, steps=60)
    return replace(arms, control=control)


@fault("induction was unlearned", "heads_lost")
def induction_unlearned(arms: Arms) -> Arms:
    train(arms.retrofit, plain_language(60_000, 5), steps=120)
    return arms


@fault("nothing ever came again in training", "retrieval_lost", {"text": plain_language})
def no_repetitions(arms: Arms) -> Arms:
    train(arms.retrofit, plain_language(60_000, 5), steps=120)
    return arms
