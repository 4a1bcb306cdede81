"""Attaching a relative position bias to the modules of a plain model, and taking it off again."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .anatomy import Anatomy, AttentionFacts, submodels
from .bias import RelativePositionBias
from .buckets import Bucketing
from .errors import ConfigError
from .factor import ContentFactor, RotaryPairs
from .families import FACTOR, TABLE, UNSCALED, is_own
from .interface import BIAS_HOOKS, CAUSAL, RUN, SILENCERS, biased_attention, plain_attention
from .mechanisms import neutralise, remove_hooks, restore
from .positions import keep_positions, read_positions, refuse_positions, tag_position_ids, takes_positions
from .releases import OLDEST, check_release
from .settings import check_against

SCALING = "rpb_scaling"
"""Attribute of an attention module: the scale that it had."""


def attach_bias(anatomy: Anatomy) -> None:
    """Neutralise the mechanism of a plain model and attach zero tables, as its ``config.rpb_retrofit`` says.

    Raises UnsupportedModelError, ReleaseError, PartialMatchError or ConfigError before anything is changed.
    """
    model, family, settings = anatomy.model, anatomy.family, anatomy.model.config.rpb_retrofit
    check_release(transformers.__version__, family.since or OLDEST)
    facts = {name: anatomy.facts(name) for name in anatomy.attentions}
    check_against(settings, anatomy, str(model.config.name_or_path))
    tables = _new_tables(facts, settings)
    _check_directions(settings, {table.bucketing.bidirectional for table in tables.values()})
    kept, in_layers = settings.get("kept_frequencies", {}), settings.get("kept_in_layers", [])
    neutralise(anatomy, kept, settings.get("text_lengths", []), in_layers)
    for module in anatomy.every_attention:
        setattr(module, RUN, plain_attention)
    for name, module in anatomy.attentions.items():
        device = next(module.parameters()).device
        setattr(module, TABLE, on(device, tables[name]))
        if pairs := settings.get(FACTOR):
            setattr(module, FACTOR, on(device, ContentFactor(facts[name].heads, RotaryPairs(**pairs))))
        setattr(module, RUN, biased_attention)
        setattr(module, CAUSAL, facts[name].causal)
        if settings.get("scale") == UNSCALED:
            drop_scale(module)
        if hasattr(module, "has_relative_attention_bias"):  # T5: no table of its own any more
            module.has_relative_attention_bias = False
        if family.silenced:
            module.register_forward_pre_hook(SILENCERS[family.silenced], with_kwargs=True)
        module.register_forward_pre_hook(BIAS_HOOKS[family.bias_argument], with_kwargs=True)
    _follow_positions(anatomy)


def _new_tables(facts: dict[str, AttentionFacts], settings: dict[str, Any]) -> dict[str, RelativePositionBias]:
    """Zero tables by the name of their attention; where layers share, one for each number of heads and direction."""
    shared: dict[tuple[int, Bucketing], RelativePositionBias] = {}
    tables = {}
    for name, attention in facts.items():
        bucketing = Bucketing(
            settings["relative_attention_num_buckets"],
            settings["relative_attention_max_distance"],
            bidirectional=not attention.causal,
        )
        kind = attention.heads, bucketing
        table = shared.get(kind) if settings["shared"] else None
        tables[name] = shared[kind] = table or RelativePositionBias(*kind, tail=settings.get("tail") == "log")
    return tables


def _check_directions(settings: dict[str, Any], needed: set[bool]) -> None:
    """A checkpoint's tables serve the directions that they were made for: a table's shape would not tell."""
    made_for = settings.setdefault("bidirectional", sorted(needed))
    if not needed <= set(made_for):
        kinds = {True: "bidirectional", False: "causal"}
        raise ConfigError(
            f"the tables of '{settings['source']}''s retrofit are {' and '.join(kinds[b] for b in made_for)}, and this "
            f"model's attention is {kinds[(needed - set(made_for)).pop()]}: leave is_decoder and is_causal as they were"
        )


def _follow_positions(anatomy: Anatomy) -> None:
    """Let the bias follow the ``position_ids`` that a model is given, or refuse them where it takes none."""
    takers = anatomy.positioned
    for taker in takers:
        taker.register_forward_pre_hook(read_positions, with_kwargs=True)
        taker.register_forward_hook(keep_positions, with_kwargs=True)
        if not anatomy.family.uses_interface:
            taker.register_forward_pre_hook(tag_position_ids, with_kwargs=True)
    within = {part for taker in takers for part in submodels(taker)}
    for submodel in anatomy.submodels:
        if submodel not in within and not takes_positions(submodel):
            submodel.register_forward_pre_hook(refuse_positions, with_kwargs=True)


def on(device: torch.device, module: nn.Module) -> nn.Module:
    """A module of our own on a device; where it is already, it stays untouched, as fake tensors must."""
    return module if next(module.parameters()).device == device else module.to(device)


def detach_bias(anatomy: Anatomy) -> None:
    """Undo `attach_bias`, however far it came. T5's own tables are the caller's to put back."""
    restore(anatomy.model)
    for module in anatomy.model.modules():
        vars(module).pop(RUN, None)
        vars(module).pop(CAUSAL, None)
    for module in anatomy.attentions.values():
        remove_hooks(module, *BIAS_HOOKS.values(), *SILENCERS.values())
        module._modules.pop(TABLE, None)
        module._modules.pop(FACTOR, None)
        if SCALING in vars(module):
            module.scaling = vars(module).pop(SCALING)
    for submodel in anatomy.submodels:
        remove_hooks(submodel, read_positions, keep_positions, tag_position_ids, refuse_positions)


def drop_scale(attention: Any) -> None:
    """Let an attention module take its queries as they are: the scale is in the weights that make them."""
    setattr(attention, SCALING, attention.scaling)
    attention.scaling = 1.0


def detach_factors(model: nn.Module) -> None:
    """Take the factors on the content term off, and out of the configs: they are part of the weights now."""
    for module in model.modules():
        module._modules.pop(FACTOR, None)
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = {k: v for k, v in submodel.config.rpb_retrofit.items() if k != FACTOR}


def table_names(model: nn.Module) -> list[str]:
    """Names of the tables' parameters in the model's state dict, a shared table once."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RelativePositionBias)]


def own_names(model: nn.Module) -> list[str]:
    """Names of all parameters that the retrofit added: tables, tails and factors; shared ones once."""
    return [name for name, _ in model.named_parameters() if is_own(name)]
