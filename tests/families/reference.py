"""An independent reference: Transformers' own eager code in float64, its mechanism overwritten, a bias in its softmax.

It shares no code with the package: buckets come from Transformers' T5, rotary frequencies are set to zero, position
vectors to their mean, ALiBi's slopes to zero, and the bias is added to whatever reaches the softmax.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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
    active: list[tuple[Tensor, bool, int]] = []
    handles = []
    for name, table in tables.items():
        module = model.get_submodule(name)

        def enter(module: nn.Module, args: object, kwargs: dict, table: Tensor = table) -> None:
            active.append((table, not getattr(module, "is_causal", True), hasattr(module, "sinks")))

        def leave(*_: object) -> None:
            active.pop()

        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    plain_softmax = nn.functional.softmax

    def softmax(scores: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        if active and scores.ndim == 4:
            table, bidirectional, sinks = active[-1]
            queries, keys = scores.shape[2], scores.shape[3] - sinks
            at = torch.arange(keys)[None] if positions is None else positions
            memory_minus_query = at[:, None, :keys] - at[:, :queries, None]
            bucket = T5Attention._relative_position_bucket(
                memory_minus_query, bidirectional, num_buckets=table.shape[1], max_distance=max_distance
            )
            bias = torch.zeros(len(at), table.shape[0], queries, keys + sinks, dtype=torch.float64)
            bias[..., :keys] = torch.einsum(
                "hb,nqkb->nhqk", table.double(), nn.functional.one_hot(bucket, table.shape[1]).double()
            )
            scores = scores.double().clamp(min=-1e30) + bias  # a row of minus infinities would be NaN
        return plain_softmax(scores, dim)

    with torch.no_grad():
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
    patches = [mock.patch.object(nn.functional, "softmax", softmax)]
    if case.alibi:
        modeling = importlib.import_module(type(model).__module__)
        slopes = getattr(modeling, case.alibi)
        patches.append(mock.patch.object(modeling, case.alibi, lambda *a, **k: torch.zeros_like(slopes(*a, **k))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
        for handle in handles:
            handle.remove()
