"""What each head attends to, in the source and in its retrofit, as something to learn from.

Distilling attention itself, layer by layer, needs far fewer tokens than predictions alone (LinearARD, Yang et al. 2026,
does so for a change of RoPE; MiniLM, Wang et al. 2020, arXiv:2002.10957). Some rows of each attention are enough, so
memory stays linear in the length.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.runtime.anatomy import Anatomy, is_causal_module
from rpb_retrofit.runtime.families import FACTOR, TABLE
from rpb_retrofit.runtime.line import bias_matrix
from rpb_retrofit.runtime.visibility import dense, is_runs
from rpb_retrofit.training.divergence import divergence

ROWS = 32
"""Queries of a sequence whose attention is compared."""


class Relations:
    """Compares the attention of two models of the same layers, while both run on the same batch.

    Both are intercepted from the start until `close`. ConfigError where a model's attention hands no rows out.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self._rows: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        anatomies = [Anatomy.of(model) for model in (student, teacher)]
        for anatomy in anatomies:
            if not anatomy.family.uses_interface:
                kind = type(anatomy.model).__name__
                raise ConfigError(f"relations: {kind} has attention of its own, which hands no rows out: leave it out")
        with ExitStack() as undo:
            for anatomy, rows in zip(anatomies, self._rows, strict=True):
                undo.enter_context(intercepted(anatomy, partial(self._intercept, rows), with_bias=False))
            self.close = undo.pop_all().close

    def _intercept(self, rows: dict[str, Tensor], name: str, attend: Attend) -> Attend:
        return partial(self._take, rows, name, attend)

    def _take(
        self,
        rows: dict[str, Tensor],
        name: str,
        run: Attend,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """In the place of an attention: the same, after some of its rows were kept."""
        # A student that is only evaluated has nobody to compare with. Gradient checkpointing comes here twice for a
        # layer, and must find the same work both times.
        if module.training or rows is self._rows[1]:
            rows[name] = _scores(module, query, key, attention_mask, **kwargs)
        return run(module, query, key, value, attention_mask, **kwargs)

    def apart(self) -> Tensor:
        """KL divergence of the student's attention from the teacher's in their last passes, over the same batch: a
        scalar, the mean over layers, heads and rows."""
        student, teacher = self._rows
        assert student.keys() == teacher.keys() and student, "both ran, layer by layer"
        means = []
        for name, scores in student.items():
            nothing = (scores == -torch.inf).all(-1, keepdim=True)  # padding's rows
            both = (x.masked_fill(nothing, 0) for x in (scores, teacher[name].detach()))
            means.append(divergence(*both) / (~nothing).sum().clamp(min=1))
        return torch.stack(means).mean()


def _scores(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Scores (batch, heads, rows, K) of evenly spread queries, float32, minus infinity where a key is hidden."""
    if s_aux is not None:
        raise ConfigError("relations: attention with sinks is not compared: leave it out")
    queries, keys = query.shape[2], key.shape[2]
    at = torch.linspace(0, queries - 1, min(ROWS, queries), device=query.device).long()
    if (factor := module._modules.get(FACTOR)) is not None:
        query = factor(query)
    query, key = query[:, :, at].float(), key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if TABLE in module._modules:
        scores = scores + bias_matrix(getattr(module, TABLE), queries, keys, 0, query.device)[:, at]
    if mask is None:
        seen = at[:, None] >= torch.arange(keys, device=query.device) if is_causal_module(module) else None
    elif is_runs(mask):
        seen = dense(mask[:, :, at], keys)
    else:
        mask = mask[:, :, at] if mask.shape[2] > 1 else mask
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)
