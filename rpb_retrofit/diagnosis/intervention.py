"""Running a model with one thing about its attention changed: undoing a suspected cause, to see what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.position_probe import weights_of
from rpb_retrofit.instruments.attributes import set_attribute
from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.runtime.mechanisms import hand_over
from rpb_retrofit.runtime.rotation import FEWER, Fewer, scaling_of

HIDDEN = -1e4
"""What a bias is where a key is hidden: no score makes good for it, and unlike minus infinity it cannot give NaN."""


@dataclass(frozen=True)
class Change:
    """What is changed in every attention, in one forward pass without a cache.

    ``scale``: the content term is multiplied by it. ``trained``: beyond that many keys it also grows with the logarithm
    of their number, so that attention does not spread. ``window``: keys farther away than that are not seen.
    ``rope``: settings of ``rope_parameters`` that replace the model's own.
    """

    scale: float = 1.0
    trained: int | None = None
    window: int | None = None
    rope: Mapping[str, Any] | None = None


@contextmanager
def changed(anatomy: Anatomy, change: Change) -> Iterator[None]:
    """Inside, the model runs with the change; afterwards as before."""
    with ExitStack() as undo:
        if change.rope is not None:
            undo.enter_context(_rotated_by(anatomy, change.rope))
        if change.scale != 1 or change.trained is not None or change.window is not None:
            undo.enter_context(intercepted(anatomy, partial(_with, change)))
        yield


def _with(change: Change, name: str, attend: Attend) -> Attend:
    def run(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        factor = torch.full((query.shape[2], 1), change.scale, device=query.device)
        if change.trained is not None:
            seen = torch.arange(1, query.shape[2] + 1, device=query.device)[:, None]
            factor = factor * (seen.log() / math.log(change.trained)).clamp(min=1)
        with _narrowed(module, change.window):
            return attend(module, query * factor.to(query.dtype), *args, **kwargs)

    return run


@contextmanager
def _narrowed(module: Any, window: int | None) -> Iterator[None]:
    """Inside, a module's bias hides the keys that are ``window`` or more away."""
    if window is None:
        yield
        return
    bias, owner = getattr(module, TABLE), module._modules if TABLE in module._modules else vars(module)

    def narrow(offset: Tensor) -> Tensor:
        return bias(offset).masked_fill(offset.abs() >= window, HIDDEN)

    owner[TABLE] = narrow
    try:
        yield
    finally:
        owner[TABLE] = bias


@contextmanager
def _rotated_by(anatomy: Anatomy, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the rotary modules of a model are made from its config with other ``rope_parameters``."""
    model, holders = anatomy.model, anatomy.position_modules
    with ExitStack() as undo:
        for name, holder in holders.items():
            config = deepcopy(holder.config)
            config.rope_parameters = {**config.rope_parameters, **settings}
            other = type(holder)(config=config).to(model.device)
            hand_over(holder, other)
            _follow_scaling(undo, anatomy, other)
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            undo.callback(setattr, owner, child, holder)
            setattr(owner, child, other)
        yield


def _follow_scaling(undo: ExitStack, anatomy: Anatomy, rotary: Any) -> None:
    """Let attentions that keep fewer frequencies take the scaling of another rotary module, until undone."""
    for name, module in anatomy.attentions.items():
        fewer: Fewer | None = getattr(module, FEWER, None)
        if fewer is not None and hasattr(rotary, buffer := anatomy.rotary_buffers[name]):
            set_attribute(undo, module, FEWER, replace(fewer, scaling=scaling_of(rotary, buffer)))


@contextmanager
def with_biases(arms: Arms, biases: Mapping[str, RelativePositionBias]) -> Iterator[None]:
    """Inside, attentions of the retrofit have other bias modules, by name."""
    modules = {name: arms.attentions[name]._modules for name in biases}
    before = {name: owner[TABLE] for name, owner in modules.items()}
    try:
        for name, bias in biases.items():
            modules[name][TABLE] = bias
        yield
    finally:
        for name, owner in modules.items():
            owner[TABLE] = before[name]


def with_reach(arms: Arms, names: Sequence[str], distance: int) -> AbstractContextManager[None]:
    """Inside, the tables of these attentions are spread to another maximum distance."""
    biases = {}
    for name in names:
        own = arms.biases[name]
        buckets = Bucketing(own.bucketing.num_buckets, distance, own.bucketing.bidirectional)
        biases[name] = bias_of(buckets, own.weight.detach(), own.tail)
    return with_biases(arms, biases)


def bias_of(bucketing: Bucketing, table: Tensor, tail: Tensor | None = None) -> RelativePositionBias:
    """A bias module with this table (heads, buckets), and a tail (heads, directions) where there is one."""
    bias = RelativePositionBias(len(table), bucketing, tail=tail is not None).to(table.device)
    with torch.no_grad():
        bias.weight.copy_(table)
        if tail is not None and bias.tail is not None:
            bias.tail.copy_(tail.detach())
    return bias.eval()


@contextmanager
def with_tables(
    biases: Mapping[str, RelativePositionBias], change: Callable[[str, RelativePositionBias], Tensor]
) -> Iterator[None]:
    """Inside, each table (heads, buckets) is what ``change`` makes of its name and module."""
    before = {name: bias.weight.detach().clone() for name, bias in biases.items()}
    new = {name: change(name, bias) for name, bias in biases.items()}
    with torch.no_grad():
        try:
            for name, table in new.items():
                biases[name].weight.copy_(table)
            yield
        finally:
            for name, table in before.items():
                biases[name].weight.copy_(table)


@contextmanager
def attending_as(arms: Arms, source: Anatomy, heads: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these heads (heads,), bool, of the retrofit's attentions look where the source's do in the same text.

    For families that use the interface, and passes without a cache.
    """
    weights: dict[str, Tensor] = {}

    def overhear(module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        with intercepted(source, partial(_keep_weights, weights), heads):
            source.model.base_model(input_ids=ids, use_cache=False)

    handle: Any = arms.retrofit.register_forward_pre_hook(overhear, with_kwargs=True)
    try:
        with intercepted(arms.anatomy, partial(_with_weights, weights, heads), heads):
            yield
    finally:
        handle.remove()


def _keep_weights(kept: dict[str, Tensor], name: str, attend: Attend) -> Attend:
    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        kept[name] = weights_of(partial(attend, module), query, key, value.shape[-1], mask, kwargs)
        return attend(module, query, key, value, mask, **kwargs)

    return run


def _with_weights(
    source_weights: Mapping[str, Tensor], heads: Mapping[str, Tensor], name: str, attend: Attend
) -> Attend:
    def run(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(module, query, key, value, mask, **kwargs)
        chosen = heads[name].to(output.device)
        all_values = value[0].repeat_interleave(query.shape[1] // value.shape[1], 0)
        there = source_weights[name].to(output.device)[chosen] @ all_values[chosen].float()
        output = output.clone()
        output[0, :, chosen] = there.transpose(0, 1).to(output.dtype)
        return output, weights

    return run


@contextmanager
def with_weights(model: PreTrainedModel, source: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Inside, these weights of a model are its source's."""
    kept = {name: model.get_parameter(name).data for name in names}
    try:
        for name, own in kept.items():
            model.get_parameter(name).data = source.get_parameter(name).data.to(own)
        yield
    finally:
        for name, own in kept.items():
            model.get_parameter(name).data = own
