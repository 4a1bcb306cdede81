"""The scale of the content term, folded into the weights that make the queries: the retrofit then adds its bias to
undivided products of queries and keys, as T5 does.

Which weights those are is not looked up but seen, as in `folding`: at the first position nothing rotates, so there the
queries are, up to a constant, outputs of a projection, or of a norm behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import drop_scale
from rpb_retrofit.runtime.families import UNSCALED
from rpb_retrofit.tables.folding import ALIKE, TOKENS, unit

SUMMED, NEAR = 1e-4, 0.01
"""Relative error of queries up to which it counts as rounding: of long sums in float32, and in the coarsest dtype."""

LEAVE = "leave scale='source'"


class Maker(NamedTuple):
    """A layer of an attention, called on ``given``: its output ``made`` (tokens, N) has the queries at ``at``."""

    layer: str
    module: Any
    given: Tensor
    made: Tensor
    at: Tensor


@torch.no_grad()
def unscale(anatomy: Anatomy, before: dict[str, Tensor]) -> int:
    """Fold the scales of all attentions of an attached model, and say so in its configs; how many weights changed.

    ``before`` receives those weights as they were, by name, unless it has them. A scale of one needs nothing. Raises
    ConfigError for a model that does not tell its scale, or whose queries no weights make; what was changed by then
    is the caller's to put back.
    """
    model, attentions = anatomy.model, anatomy.attentions
    what, kind = f"scale='{UNSCALED}'", type(model).__name__
    scales = {name: anatomy.facts(name).scale for name in attentions}
    if untold := [name for name, scale in scales.items() if scale is None]:
        raise ConfigError(f"{what}: {kind} keeps the scale of its attention to itself ({untold[0]}): {LEAVE}")
    scaled = {name: scale for name, scale in scales.items() if scale is not None and scale != 1}
    observed = _observe(anatomy, list(scaled))
    makers = {name: _maker(query, calls) for name, (query, calls) in observed.items()}
    if without := [name for name in scaled if makers.get(name) is None]:
        raise ConfigError(
            f"{what}: no weights alone make the queries of {len(without)} of {len(attentions)} attentions of {kind} "
            f"({without[0]}): {LEAVE}"
        )
    changed = {
        f"{name}.{maker.layer}.{of}": parameter
        for name, maker in makers.items()
        if maker is not None
        for of, parameter in maker.module.named_parameters(recurse=False)
    }
    before.update({name: parameter.detach().clone() for name, parameter in changed.items() if name not in before})
    for name, maker in makers.items():
        if maker is not None:
            _fold(maker, scaled[name])
    after = _observe(anatomy, list(scaled))
    if wrong := [name for name, (query, _) in observed.items() if not _near(after[name][0], query, scaled[name])]:
        raise ConfigError(f"{what}: {wrong[0]} of {kind} cannot hold it in {observed[wrong[0]][0].dtype}: {LEAVE}")
    for module in attentions.values():
        drop_scale(module)
    for submodel in anatomy.submodels:
        submodel.config.rpb_retrofit = {**submodel.config.rpb_retrofit, "scale": UNSCALED}
    return len(changed)


def _observe(anatomy: Anatomy, names: Sequence[str]) -> dict[str, tuple[Tensor, list[Maker]]]:
    """By attention: its queries (tokens, heads * d) of texts of one token, and the calls of its layers with weights.

    Projections are given random vectors, the same ones each time.
    """
    model, attentions = anatomy.model, {name: anatomy.attentions[name] for name in names}
    queries: dict[str, Tensor] = {}
    calls: dict[str, list[Maker]] = {name: [] for name in attentions}

    def hear(name: str, layer: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape[0] == TOKENS:
            calls[name].append(Maker(layer, module, args[0], output.flatten(1), torch.empty(0)))

    def listen(name: str, attend: Attend) -> Attend:
        def run(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            queries[name] = query.flatten(1)
            return attend(module, query, *args, **kwargs)

        return run

    generator = torch.Generator().manual_seed(0)

    def vary(module: nn.Module, args: Any) -> Any:
        given = torch.randn(args[0].shape, generator=generator, dtype=torch.float32)
        return given.to(args[0].device, args[0].dtype), *args[1:]

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (TOKENS, 1), generator=generator).to(model.device)
    with evaluating(model), intercepted(anatomy, listen, names), ExitStack() as undo:
        for name, attention in attentions.items():
            for layer, module in _with_weights(attention):
                if cast(Any, module).weight.dim() == 2:  # what first tokens bring is nearly the same for all of them
                    undo.callback(module.register_forward_pre_hook(vary).remove)
                undo.callback(module.register_forward_hook(partial(hear, name, layer)).remove)
        seq2seq = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        model.base_model(input_ids=ids, use_cache=False, **seq2seq)
    return {name: (query, calls[name]) for name, query in queries.items()}


def _with_weights(attention: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Projections and norms."""
    for layer, module in attention.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear | Conv1D) or (isinstance(weight, nn.Parameter) and weight.dim() == 1):
            yield layer, module


def _maker(query: Tensor, calls: list[Maker]) -> Maker | None:
    """The call that made the queries; of a norm, only if it made nothing else."""
    wanted = unit(query.T)
    for call in reversed(calls):  # a norm comes after its projection
        alike, at = (wanted @ unit(call.made.T).T).max(1)
        alone = call.module.weight.dim() == 2 or len(at) == call.made.shape[1]
        if bool((alike > ALIKE).all()) and len(at.unique()) == len(at) and alone:
            return call._replace(at=at)
    return None


def _fold(maker: Maker, scale: float) -> None:
    """Change the weights so that the queries come out ``scale`` times as large."""
    module, weight, bias = maker.module, maker.module.weight, getattr(maker.module, "bias", None)
    old, old_bias = weight.double(), None if bias is None else bias.double()
    times = torch.ones(weight.shape[-1] if isinstance(module, Conv1D) else weight.shape[0]).to(old)
    times[maker.at if weight.dim() == 2 else slice(None)] = scale
    weight.copy_(old * (times[:, None] if isinstance(module, nn.Linear) else times))
    if bias is not None and old_bias is not None:
        bias.copy_(old_bias * times)
    if weight.dim() == 1 and not _near(module(maker.given).flatten(1), maker.made, scale):
        weight.copy_((old + 1) * scale - 1)  # some norms multiply by one more than their weight


def _near(after: Tensor, before: Tensor, scale: float) -> bool:
    """Whether the one is ``scale`` times the other, but for rounding."""
    allowed = min(max(SUMMED, 4 * torch.finfo(before.dtype).eps), NEAR)
    wanted = before.double() * scale
    return bool((after.double() - wanted).norm() <= allowed * wanted.norm())
