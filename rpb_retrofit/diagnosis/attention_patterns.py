"""Where the heads of a running model look: how widely, at the token before, at what followed the same token before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.instruments.modes import eager, evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.tables.recording import run

See = Callable[[str, Tensor], None]
"""Told the name of an attention and its weights (heads, Q, K)."""


@torch.no_grad()
def observe(anatomy: Anatomy, window: Tensor, see: See) -> None:
    """One forward pass of a window (n,), in which ``see`` is shown the weights of every attention in turn."""
    with ExitStack() as undo:
        if anatomy.family.uses_interface:
            undo.enter_context(intercepted(anatomy, partial(_watched, see)))
        else:
            undo.enter_context(eager(anatomy))
            for name, module in anatomy.attentions.items():
                undo.callback(module.register_forward_hook(partial(_shown, see, name)).remove)
        undo.enter_context(evaluating(anatomy.model))
        run(anatomy.model, window)


def _watched(see: See, name: str, attend: Attend) -> Attend:
    def watched(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = attend(module, *args, **{**kwargs, "output_attentions": True})
        assert weights is not None, "they were asked for"
        see(name, weights[0].float())
        return output, weights

    return watched


def _shown(see: See, name: str, module: Any, args: Any, output: tuple[Any, ...]) -> None:
    see(name, output[1][0].float())


@dataclass(frozen=True)
class AttentionPatterns:
    """Of every attention, by name: ``spread`` (heads, bins), the mean entropy in nats of queries whose logarithm of
    visible keys lies in each bin; ``previous`` (heads,): mean weight on the token before; ``induction`` (heads,): mean
    weight, in the second of two copies of random tokens, on what followed the same token in the first one."""

    spread: dict[str, Tensor]
    previous: dict[str, Tensor]
    induction: dict[str, Tensor]

    def slopes(self) -> Tensor:
        """By how many nats the entropy grows as the keys double, (attentions, heads), over the far half of the bins."""
        halves = [s[:, min(s.shape[1] // 2, max(0, s.shape[1] - 2)) :].diff(dim=1) for s in self.spread.values()]
        return torch.stack([half.mean(1) if half.shape[1] else half.new_zeros(len(half)) for half in halves])


def attention_patterns(anatomy: Anatomy, text: Tensor, tokens: Tensor, period: int) -> AttentionPatterns:
    """Where a causal model's heads look, on a window of ``text`` (n,) and on ``period`` random ones of the ``tokens``,
    twice."""
    spread: dict[str, Tensor] = {}
    previous: dict[str, Tensor] = {}
    induction: dict[str, Tensor] = {}

    def see_text(name: str, weights: Tensor) -> None:
        keys = weights.shape[-1]
        entropy = -torch.xlogy(weights, weights).sum(-1)
        edges = [2**power for power in range(min(3, keys.bit_length() - 1), keys.bit_length()) if 2**power <= keys]
        spread[name] = torch.stack([entropy[:, e - 1 : 2 * e - 1].mean(1) for e in edges], 1).cpu()
        previous[name] = weights.diagonal(-1, 1, 2).mean(1).cpu()

    def see_copies(name: str, weights: Tensor) -> None:
        induction[name] = weights.diagonal(1 - period, 1, 2)[:, 1:].mean(1).cpu()

    generator = torch.Generator().manual_seed(0)
    drawn = tokens[torch.randint(len(tokens), (period,), generator=generator)]
    observe(anatomy, text, see_text)
    observe(anatomy, torch.cat([drawn, drawn]), see_copies)
    return AttentionPatterns(spread, previous, induction)
