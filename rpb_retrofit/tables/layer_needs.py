"""Which layers lack the rest of their rotation most: how much better far copies would be with a little of it back.

A span of random tokens comes again far below, where nothing but attention to its first place predicts it. In each
attention of a fitted retrofit a share of what the source's attention makes of the same inputs is mixed in; the
derivative of the span's loss by that share, at zero, says what the layer's own attention costs. One pass forward and
one backward give it for all layers.

Neither the divergence of the attention nor the missed share of the outputs tells these layers from the others: what
carries a copy over a long distance is a small part of both. It is only as good as the first fit that it looks at: a
layer that a better fit would mend looks needy after a rough one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.instruments.interception import zero_bias
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import FACTOR, TABLE
from rpb_retrofit.runtime.rotation import ROTATION, called_buffer

ITEMS = 4
"""Texts with a span that comes again, at distances from a quarter of the window on to nearly all of it."""

SPAN = 48
"""Tokens of the span, or a quarter of the window where that is less."""


def layer_needs(anatomy: Anatomy, windows: Sequence[Tensor], seed: int = 0) -> dict[str, float]:
    """By the name of each attention of an attached model with fitted tables: nats a token that the loss of a far copy
    would fall by, were the whole of the source's attention as good as its first small share; at least zero.

    ``windows`` are texts (n,) of token ids; the longest are read. ConfigError for a model that predicts no next token,
    or keeps its attention to itself.
    """
    model, family = anatomy.model, anatomy.family
    kind = type(model).__name__
    if not family.uses_interface:
        raise ConfigError(f"keep_frequencies: {kind} keeps its attention to itself, so name the layers, as in 20,3:all")
    if model.get_output_embeddings() is None or not all(anatomy.facts(name).causal for name in anatomy.attentions):
        raise ConfigError(f"keep_frequencies: {kind} predicts no next token, so name the layers, as in 20,3:all")
    longest, known = sorted(windows, key=len, reverse=True)[:ITEMS], torch.cat(list(windows)).unique().tolist()
    shares = {name: torch.zeros((), device=model.device, requires_grad=True) for name in anatomy.attentions}
    needs = dict.fromkeys(shares, 0.0)
    with evaluating(model), _frozen(model), _with_shares(anatomy, shares), torch.enable_grad():
        for item in range(ITEMS):
            ids, at = _item(longest[item % len(longest)], known, item, seed)
            loss = _loss(model, ids.to(model.device), at.to(model.device))
            slopes = torch.autograd.grad(loss, list(shares.values()))
            for name, slope in zip(shares, slopes, strict=True):
                needs[name] += max(0.0, -float(slope)) / ITEMS
    return needs


def _item(window: Tensor, known: list[int], item: int, seed: int) -> tuple[Tensor, Tensor]:
    """A window with a span of known tokens at two places, no token twice in it, and the positions whose next tokens are
    scored."""
    span = min(SPAN, len(window) // 4, len(known))
    again, text = len(window) - span, window.clone()
    first = again - min(again, max(span, (item + 1) * len(window) // ITEMS))
    text[first : first + span] = text[again:] = torch.tensor(Random(f"{seed} layer needs {item}").sample(known, span))
    return text, torch.arange(again, len(window) - 1)  # nothing announces its first token


def _loss(model: Any, ids: Tensor, at: Tensor) -> Tensor:
    """The mean loss in nats of the tokens that follow the positions ``at``; logits are made of no others."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0][:, at], *args[1:]))
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        hook.remove()
    return F.cross_entropy(logits.float(), ids[at + 1])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: half of what a backward pass keeps is kept for theirs."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _with_shares(anatomy: Anatomy, shares: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each attention's output has a share of what it would be with the source's whole rotation and no bias."""
    whole: dict[str, Any] = {}
    with ExitStack() as undo:
        for rotary in anatomy.position_modules.values():
            hook = rotary.register_forward_pre_hook(partial(_rotate_whole, whole), with_kwargs=True, prepend=True)
            undo.callback(hook.remove)
        for name, share in shares.items():
            mix = partial(_mix, whole, anatomy.rotary_buffers[name], share)
            undo.callback(anatomy.attentions[name].register_forward_hook(mix, with_kwargs=True).remove)
        yield


def _rotate_whole(whole: dict[str, Any], rotary: Any, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of a rotary module, before any other: keep what it would give with all its frequencies."""
    whole[called_buffer(args, kwargs)] = rotary.forward(*args, **kwargs)


@torch.no_grad()
def _as_source(whole: Mapping[str, Any], buffer: str, module: Any, args: Any, kwargs: Any) -> Tensor:
    """What a module makes of the same inputs with its whole rotation, and without bias and factors."""
    bias, factor = getattr(module, TABLE), module._modules.pop(FACTOR, None)
    module._modules[TABLE] = partial(zero_bias, len(bias.weight))
    try:
        output: Tensor = module.forward(*args, **{**kwargs, ROTATION: whole[buffer]})[0]
    finally:
        module._modules[TABLE] = bias
        if factor is not None:
            module._modules[FACTOR] = factor
    return output


def _mix(
    whole: Mapping[str, Any], buffer: str, share: Tensor, module: Any, args: Any, kwargs: Any, output: Any
) -> tuple[Any, ...]:
    """Forward hook of an attention: its output, and a share of the way to the source's."""
    own, *rest = output
    missing = _as_source(whole, buffer, module, args, kwargs) - own.detach()
    return (own + share.to(own.dtype) * missing, *rest)
