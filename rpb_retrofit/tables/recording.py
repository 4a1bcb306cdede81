"""What a running model's attention computes, layer by layer: the rows that a fit reads.

A layer's rows are taken where its model calls the attention function, so nothing here knows how a family makes its
queries and keys. They are kept on disk: memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rpb_retrofit.errors import PartialMatchError
from rpb_retrofit.files.spool import Spool
from rpb_retrofit.runtime.families import TABLE, Family
from rpb_retrofit.runtime.interface import ATTENTION, CAUSAL, RUN, biased_attention, is_causal_module, plain_attention
from rpb_retrofit.runtime.modeling import block_names, num_heads, submodels
from rpb_retrofit.runtime.visibility import is_runs, runs_of
from rpb_retrofit.tables.attention_rows import AttentionRows

Take = Callable[[str, AttentionRows], None]
"""Told the name of an attention module and the rows of its attention."""

Run = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention: what `runtime.interface.biased_attention` is."""

FAINTEST = -80.0
"""The least logarithm of an attention weight, where a model hands out only weights: smaller ones round to zero."""


class StopForward(Exception):  # noqa: N818 - nothing went wrong
    """Raised inside a forward pass whose rest nobody needs."""


@torch.no_grad()
def run(model: PreTrainedModel, window: Tensor) -> None:
    """One forward pass of a window (n,) of token ids, without the head; it may end in `StopForward`."""
    ids = window[None].to(model.device)
    seq2seq = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        model.base_model(input_ids=ids, use_cache=False, **seq2seq)
    except StopForward:
        return


def record_source(
    model: PreTrainedModel,
    family: Family,
    attentions: Mapping[str, Any],
    windows: Sequence[Tensor],
    positions: Sequence[range],
    spool: Spool,
    progress: Callable[[int], object],
) -> list[str]:
    """Keep the rows of every attention of a plain model, keyed ("source", name, window); their names in running order.

    The model is left as it was. Raises PartialMatchError where an attention did not run, or ran twice.
    """
    order: list[str] = []
    with watch(model, family, attentions) as listen:
        for number, (window, queries) in enumerate(zip(windows, positions, strict=True)):
            ran: list[str] = []

            def take(name: str, rows: AttentionRows, number: int = number, ran: list[str] = ran) -> None:
                spool["source", name, number] = rows.answered()
                ran.append(name)

            listen(take, queries)
            run(model, window)
            if sorted(ran) != sorted(attentions):
                odd = [name for name in attentions if ran.count(name) != 1]
                raise PartialMatchError(
                    f"{type(model).__name__}: {len(odd)} attentions did not run once per text: {', '.join(odd)}; "
                    "init='calibrated' is not possible, take init='zeros'"
                )
            order = ran
            progress(1)
    return order


@contextmanager
def watch(
    model: PreTrainedModel, family: Family, attentions: Mapping[str, Any]
) -> Iterator[Callable[[Take, range], None]]:
    """Inside, the function it gives says who takes the rows, and of which query positions, from then on."""
    listener: list[tuple[Take, range]] = []

    def listen(take: Take, positions: range) -> None:
        listener[:] = [(take, positions)]

    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        if family.uses_interface:
            _watch_interface(model, attentions, listener, undo)
        else:
            undo.enter_context(eager(model))
            for name, module in attentions.items():
                undo.callback(module.register_forward_hook(partial(_take_weights, name, listener)).remove)
        yield listen


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no module of the model trains; then each does what it did before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that does not use the interface runs its eager attention, which hands out its weights."""
    with ExitStack() as undo:
        for config in {id(m.config): m.config for m in submodels(model)}.values():
            _set(undo, config, "_attn_implementation_internal", "eager")
        yield


def _watch_interface(
    model: PreTrainedModel, attentions: Mapping[str, Any], listener: list[tuple[Take, range]], undo: ExitStack
) -> None:
    undo.enter_context(intercepted(model, attentions, lambda name, run: partial(_take_rows, name, listener, run)))


@contextmanager
def intercepted(
    model: PreTrainedModel, attentions: Mapping[str, Any], wrap: Callable[[str, Run], Run]
) -> Iterator[None]:
    """Inside, each attention of a model that uses the interface runs ``wrap(name, run)`` in the place of its ``run``.

    A source's ``run`` is the same attention as a retrofit's, with a bias of zero.
    """
    with ExitStack() as undo:
        if getattr(model.config, "rpb_retrofit", None) is None:
            for config in {id(m.config): m.config for m in submodels(model)}.values():
                _set(undo, config, "_attn_implementation_internal", ATTENTION)
            for module in model.modules():
                if "Attention" in type(module).__name__:
                    _set(undo, module, RUN, plain_attention)
            for module in attentions.values():
                _set(undo, module, TABLE, partial(_no_bias, num_heads(module, model.config)))
                _set(undo, module, CAUSAL, is_causal_module(module))
                _set(undo, module, RUN, biased_attention)
        for name, module in attentions.items():
            _set(undo, module, RUN, wrap(name, vars(module)[RUN]))
        yield


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an instance attribute until ``undo``, past what classes do when an attribute is set."""
    before = vars(owner)
    if name in before:
        undo.callback(before.__setitem__, name, before[name])
    else:
        undo.callback(before.pop, name)
    before[name] = value


def _no_bias(heads: int, offset: Tensor) -> Tensor:
    return torch.zeros(heads, len(offset), device=offset.device)


def _take_rows(
    name: str,
    listener: list[tuple[Take, range]],
    attend: Run,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """In the place of an attention's own run: the same, after its rows were taken."""
    take, positions = listener[0]
    at = torch.tensor(positions, device=query.device)
    rows = AttentionRows(
        positions=positions,
        seen=_seen(attention_mask, at, key.shape[2], getattr(module, CAUSAL)),
        keys=key.shape[2],
        query=query[0, :, at],
        key=key[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        value=value[0],
    )
    take(name, rows)
    return attend(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs)


def _take_weights(
    name: str, listener: list[tuple[Take, range]], module: nn.Module, args: Any, output: tuple[Tensor, ...]
) -> None:
    """Forward hook of an attention that does not use the interface: its weights stand for its scores."""
    take, positions = listener[0]
    weights = output[1][0]  # (heads, Q, K)
    at = torch.tensor(positions, device=weights.device)
    scores = weights[:, at].float().log().clamp(min=FAINTEST)
    take(
        name,
        AttentionRows(positions, _seen(None, at, weights.shape[-1], causal=True), weights.shape[-1], scores=scores),
    )


def _seen(mask: Tensor | None, at: Tensor, keys: int, causal: bool) -> Tensor:
    """The runs (R, 2) of the keys that the queries at these positions see."""
    if mask is None:
        last = at + 1 if causal else torch.full_like(at, keys)
        return torch.stack([torch.zeros_like(at), last], 1)
    if not is_runs(mask):
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        queries = allowed.shape[2]
        runs = runs_of(lambda start, end: allowed[:1, :1, start:end], queries, keys)
        assert runs is not None, "windows are never padded, so no row has gaps"
        mask = runs
    return mask[0, 0].to(at.device)[at if mask.shape[2] > 1 else at * 0].long()


@contextmanager
def resumed(model: PreTrainedModel, blocks: Sequence[str], at: int, saved: Spool, window: int) -> Iterator[None]:
    """Inside, a forward pass computes the blocks from ``at - 1`` on; for those before, the last saved output stands.

    ``blocks`` are in running order. The output of block ``at - 1`` is saved, keyed (its stack, window).
    """
    with ExitStack() as undo:
        for index, name in enumerate(blocks[:at]):
            block, key = model.get_submodule(name), (_stack_of(name), window)
            if index < at - 1:
                _set(undo, block, "forward", partial(_replay, saved, key))
            else:
                _set(undo, block, "forward", partial(_save, block.forward, saved, key))
        yield


def _replay(saved: Spool, key: tuple[str, int], *args: Any, **kwargs: Any) -> Any:
    return saved[key]


def _save(forward: Callable[..., Any], saved: Spool, key: tuple[str, int], *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    saved[key] = output
    return output


def _stack_of(block: str) -> str:
    return block.rpartition(".")[0]


def blocks_of(model: nn.Module, attentions: Sequence[str]) -> list[str]:
    """The block of each attention, by name."""
    blocks = block_names(model)
    return [next(block for block in blocks if name.startswith(f"{block}.")) for name in attentions]
