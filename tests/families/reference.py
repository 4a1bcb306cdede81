"""An independent reference: Transformers' own eager code in float64, its mechanism overwritten, a bias in its softmax.

It shares no code with the package: buckets come from Transformers' T5, rotary frequencies are set to zero, position
vectors to their mean, ALiBi's slopes to zero, and the bias is added to whatever reaches the softmax.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention

from tests.families.cases import Case


def float64_copy(case: Case, source: PreTrainedModel) -> PreTrainedModel:
    """The source again, in float64 and eager."""
    config = type(source.config).from_dict(source.config.to_dict())
    model = type(source)._from_config(config, attn_implementation="eager", experts_implementation="eager")
    model.load_state_dict(source.state_dict())
    return model.double().eval()


@dataclass(frozen=True)
class ActiveBias:
    """What the attention module that now runs adds in its softmax."""

    table: Tensor
    """(heads, buckets)"""
    bidirectional: bool
    sinks: bool
    """Whether a last column of the scores stands for a sink, which is no key."""

    def of_pairs(self, scores: Tensor, max_distance: int, positions: Tensor | None) -> Tensor:
        """For scores (batch, heads, queries, keys): (1 or batch, heads, queries, keys) float64, 0 at a sink."""
        queries, keys = scores.shape[2], scores.shape[3] - self.sinks
        at = torch.arange(keys)[None] if positions is None else positions
        memory_minus_query = at[:, None, :keys] - at[:, :queries, None]
        num_buckets = self.table.shape[1]
        bucket = T5Attention._relative_position_bucket(
            memory_minus_query, self.bidirectional, num_buckets=num_buckets, max_distance=max_distance
        )
        bias = torch.zeros(len(at), len(self.table), queries, keys + self.sinks, dtype=torch.float64)
        one_hot = nn.functional.one_hot(bucket, num_buckets).double()
        bias[..., :keys] = torch.einsum("hb,nqkb->nhqk", self.table.double(), one_hot)
        return bias


@contextmanager
def with_bias(
    case: Case,
    model: PreTrainedModel,
    tables: dict[str, Tensor],
    max_distance: int,
    positions: Tensor | None = None,
) -> Iterator[None]:
    """Within, ``model`` (float64, eager) runs without its own positions and with ``tables`` by attention module.

    ``positions`` (batch, tokens) of one pass without a cache; by default the indices.
    """
    active: list[ActiveBias] = []
    plain_softmax = nn.functional.softmax

    def softmax(scores: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        if active and scores.ndim == 4:
            bias = active[-1].of_pairs(scores, max_distance, positions)
            scores = scores.double().clamp(min=-1e30) + bias  # a row of minus infinities would be NaN
        return plain_softmax(scores, dim)

    _forget_positions(case, model)
    with ExitStack() as stack:
        for name, table in tables.items():
            _announce(model.get_submodule(name), table, active, stack)
        stack.enter_context(mock.patch.object(nn.functional, "softmax", softmax))
        if case.alibi:
            modeling = importlib.import_module(type(model).__module__)
            slopes = getattr(modeling, case.alibi)
            zeros = mock.patch.object(modeling, case.alibi, lambda *a, **k: torch.zeros_like(slopes(*a, **k)))
            stack.enter_context(zeros)
        yield


def _announce(module: nn.Module, table: Tensor, active: list[ActiveBias], stack: ExitStack) -> None:
    """While ``module`` runs, its bias is the last of ``active``; until the stack is closed."""

    def enter(module: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        active.append(ActiveBias(table, not getattr(module, "is_causal", True), hasattr(module, "sinks")))

    def leave(*_: object) -> None:
        active.pop()

    stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(leave).remove)


@torch.no_grad()
def _forget_positions(case: Case, model: PreTrainedModel) -> None:
    """Rotary frequencies and T5's tables become zero, position vectors their mean."""
    for module in model.modules():
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"  # a dynamic type would recompute its frequencies
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embeddings.weight", "wpe.weight", "embed_positions.weight")):
            parameter[:] = parameter[case.unused_rows :].mean(0, keepdim=True)
        if name.endswith("relative_attention_bias.weight"):
            parameter.zero_()
