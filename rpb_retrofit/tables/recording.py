"""What a running model's attention computes, layer by layer: the rows that a fit reads.

A layer's rows are taken where its model calls the attention function, so nothing here knows how a family makes its
queries and keys. They are kept on disk: memory does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rpb_retrofit.errors import PartialMatchError
from rpb_retrofit.files.spool import Spool
from rpb_retrofit.instruments.attributes import set_attribute
from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.instruments.modes import eager, evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.interface import CAUSAL
from rpb_retrofit.runtime.visibility import is_runs, runs_of
from rpb_retrofit.tables.attention_rows import AttentionRows

Take = Callable[[str, AttentionRows], None]
"""Told the name of an attention module and the rows of its attention."""

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
    anatomy: Anatomy,
    windows: Sequence[Tensor],
    positions: Sequence[range],
    spool: Spool,
    progress: Callable[[int], object],
) -> list[str]:
    """Keep the rows of every attention of a plain model, keyed ("source", name, window); their names in running order.

    The model is left as it was. Raises PartialMatchError where an attention did not run, or ran twice.
    """
    order: list[str] = []
    with watch(anatomy) as listen:
        for number, (window, queries) in enumerate(zip(windows, positions, strict=True)):
            ran: list[str] = []

            def take(name: str, rows: AttentionRows, number: int = number, ran: list[str] = ran) -> None:
                spool["source", name, number] = rows.answered()
                ran.append(name)

            listen(take, queries)
            run(anatomy.model, window)
            if sorted(ran) != sorted(anatomy.attentions):
                odd = [name for name in anatomy.attentions if ran.count(name) != 1]
                kind = type(anatomy.model).__name__
                raise PartialMatchError(
                    f"{kind}: {len(odd)} attentions did not run once per text: {', '.join(odd)}; "
                    "init='calibrated' is not possible, take init='zeros'"
                )
            order = ran
            progress(1)
    return order


@contextmanager
def watch(anatomy: Anatomy) -> Iterator[Callable[[Take, range], None]]:
    """Inside, the function it gives says who takes the rows, and of which query positions, from then on."""
    listener: list[tuple[Take, range]] = []

    def listen(take: Take, positions: range) -> None:
        listener[:] = [(take, positions)]

    with ExitStack() as undo:
        undo.enter_context(evaluating(anatomy.model))
        if anatomy.family.uses_interface:
            undo.enter_context(intercepted(anatomy, lambda name, attend: partial(_take_rows, name, listener, attend)))
        else:
            undo.enter_context(eager(anatomy))
            for name, module in anatomy.attentions.items():
                undo.callback(module.register_forward_hook(partial(_take_weights, name, listener)).remove)
        yield listen


def _take_rows(
    name: str,
    listener: list[tuple[Take, range]],
    attend: Attend,
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
                set_attribute(undo, block, "forward", partial(_replay, saved, key))
            else:
                set_attribute(undo, block, "forward", partial(_save, block.forward, saved, key))
        yield


def _replay(saved: Spool, key: tuple[str, int], *args: Any, **kwargs: Any) -> Any:
    return saved[key]


def _save(forward: Callable[..., Any], saved: Spool, key: tuple[str, int], *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    saved[key] = output
    return output


def _stack_of(block: str) -> str:
    return block.rpartition(".")[0]
