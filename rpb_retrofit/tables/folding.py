"""Folding the content factors into the query projection, where that is exact.

Which rows of which weight make a query is not looked up but seen: on a text, the output of a linear layer that equals a
dimension of the queries up to a constant is the one that makes it. So fused, grouped, interleaved and permuted
projections need no code of their own. Where a norm stands between, as in Qwen 3, no output does, and the factor stays
a parameter of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import detach_factors
from rpb_retrofit.runtime.factor import ContentFactor, RotaryPairs
from rpb_retrofit.runtime.families import FACTOR
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.recording import run, watch

TOKENS = 64
"""Tokens on which outputs and queries are compared."""

ALIKE = 1 - 1e-4
"""Cosine over the tokens from which on an output counts as a query's dimension: half precision rounds."""


def fold(anatomy: Anatomy, window: Tensor, kept: Mapping[str, int], before: dict[str, Tensor]) -> None:
    """Fold the factors of all attentions into the weights that make their queries, and take their modules off.

    ``before`` receives the weights as they were, by name. Nothing happens where one of the queries has no such weights.
    The highest frequencies have no factor, so many as ``kept`` says by the name of an attention.
    """
    makers, attentions = {}, anatomy.attentions
    for name, (query, outputs) in _observe(anatomy, window).items():
        pairs, none = getattr(attentions[name], FACTOR).pairs, kept.get(name, 0)
        if none == pairs.frequencies:
            continue
        if (maker := _maker(query, outputs, pairs, none)) is None:
            return
        makers[name] = maker
    for name, (layer, rows) in makers.items():
        linear, factor = anatomy.model.get_submodule(f"{name}.{layer}"), getattr(attentions[name], FACTOR)
        for kind, parameter in linear.named_parameters(recurse=False):
            before[f"{name}.{layer}.{kind}"] = parameter.detach().clone()
            _turn_rows(parameter, rows, factor, kept.get(name, 0))
    detach_factors(anatomy.model)


def _observe(anatomy: Anatomy, window: Tensor) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """By attention: its queries (heads, n, d), and the outputs (n, N) of the linear layers in it by name."""
    window = window[:TOKENS]
    outputs: dict[str, dict[str, Tensor]] = {name: {} for name in anatomy.attentions}
    queries: dict[str, Tensor] = {}

    def hear(name: str, layer: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name][layer] = output[0]

    def take(name: str, rows: AttentionRows) -> None:
        assert rows.query is not None, "families that keep their queries to themselves get no factors"
        queries[name] = rows.query.flip(1)

    hooks = [
        module.register_forward_hook(partial(hear, name, layer))
        for name, attention in anatomy.attentions.items()
        for layer, module in attention.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with watch(anatomy) as listen:
            listen(take, range(len(window) - 1, -1, -1))
            run(anatomy.model, window)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (queries[name], outputs[name]) for name in anatomy.attentions}


def _maker(query: Tensor, outputs: Mapping[str, Tensor], pairs: RotaryPairs, kept: int) -> tuple[str, Tensor] | None:
    """The linear layer whose outputs are the rotary dimensions of the queries, and which of its rows, (2, heads, F)."""
    dimensions = torch.stack([index[kept:] for index in pairs.dimensions()]).to(query.device)
    wanted = unit(query[..., dimensions].permute(2, 0, 3, 1))  # (2, heads, F, n)
    for layer, output in outputs.items():
        if output.dim() == 2 and output.shape[0] == wanted.shape[-1]:
            alike, rows = (wanted.flatten(0, 2) @ unit(output.T).T).max(1)
            if bool((alike > ALIKE).all()) and len(rows.unique()) == len(rows):
                return layer, rows.view(wanted.shape[:3])
    return None


def unit(x: Tensor) -> Tensor:
    """Rows of length one, float32."""
    return nn.functional.normalize(x.float(), dim=-1)


@torch.no_grad()
def _turn_rows(parameter: Tensor, rows: Tensor, factor: ContentFactor, kept: int) -> None:
    """Multiply pairs of rows of a weight, or entries of its bias, as complex numbers."""
    real, imaginary = factor.weight[:, kept:].double().unbind(-1)  # (heads, F)
    if parameter.dim() == 2:
        real, imaginary = real[..., None], imaginary[..., None]
    first, second = (parameter[index].double() for index in rows)
    parameter[rows[0]] = (first * real - second * imaginary).to(parameter.dtype)
    parameter[rows[1]] = (first * imaginary + second * real).to(parameter.dtype)
