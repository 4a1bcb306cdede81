"""The bias follows ``position_ids`` and the mask in graphs: compiled, traced, exported, and on fake tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PreTrainedModel, StaticCache

from rpb_retrofit.runtime import buckets
from tests.families.cases import BY_NAME, Case
from tests.support.positions import RESTARTED, by_steps
from tests.support.tiny_models import closeness, families, retrofitted, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*(slow path|generation flags):UserWarning", "ignore::FutureWarning")


@families("llama", "gpt2", "falcon-rope")
@torch.no_grad()
def test_compiled_decoding_with_positions(case: Case) -> None:
    """The usual recipe of a static cache: one graph for each token, with positions given by hand."""
    torch._dynamo.reset()
    model, ids = retrofitted(case), tokens(2, 12)
    want = model(ids, attention_mask=torch.ones_like(ids), position_ids=RESTARTED, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    by_steps(model, ids, RESTARTED, cache, [8])
    step = torch.compile(model, backend="eager", fullgraph=True)
    for at in range(8, 12):
        mask = torch.zeros(2, 16, dtype=torch.long)
        mask[:, : at + 1] = 1
        given = {"attention_mask": mask, "position_ids": RESTARTED[:, at : at + 1], "past_key_values": cache}
        assert closeness(step(ids[:, at : at + 1], **given).logits[:, 0], want[:, at]) < 1e-5


@families("llama", "gpt2", "mistral")
@torch.no_grad()
def test_graphs_of_caches_without_positions(case: Case) -> None:
    """A cache that was filled without position_ids, and one that the model makes: one graph, as of the source."""
    torch._dynamo.reset()
    model, ids = retrofitted(case), tokens(2, 12)
    want = model(ids, attention_mask=torch.ones_like(ids), position_ids=RESTARTED, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": RESTARTED}
    assert closeness(compiled(ids, **given).logits, want) < 1e-5
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :8], past_key_values=cache)
    at = torch.tensor([[3], [5]])
    positions = torch.cat([torch.arange(8)[None].expand(2, -1), at], 1)
    want = model(ids[:, :9], attention_mask=torch.ones(2, 9), position_ids=positions, use_cache=False).logits[:, 8:]
    mask = (torch.arange(16) < 9).long()[None].expand(2, -1)
    got = compiled(ids[:, 8:9], attention_mask=mask, position_ids=at, past_key_values=cache).logits
    assert closeness(got, want) < 1e-5


def call_of(case: Case, model: PreTrainedModel) -> nn.Module:
    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            extra = {} if case.kind == "encoder" else {"use_cache": False}
            if case.kind == "seq2seq":
                extra["decoder_input_ids"] = ids.flip(1)
            return self.model(input_ids=ids, attention_mask=mask, **extra).logits

    return Call()


@families("llama", "mistral", "gpt2", "bloom", "mpt", "falcon", "bert", "modernbert", "t5", "bart", "gpt_oss", "gemma2")
@pytest.mark.parametrize("length", [12, 300])
@torch.no_grad()
def test_a_traced_model_obeys_another_mask(case: Case, length: int) -> None:
    """torch.jit.trace keeps what it cannot see change: the padding must reach the graph as a tensor."""
    if length > 64 and str(case) not in ("llama", "bert"):
        pytest.skip("one decoder and one encoder are enough for a text of several blocks")
    settings = {"max_position_embeddings": 512} if length > 64 else {}
    call, ids = call_of(case, retrofitted(case, layers=1 if length > 64 else 2, **settings)), tokens(2, length)
    ones = torch.ones_like(ids)
    left, right = ones.clone(), ones.clone()
    left[1, :5], right[0, 9:] = 0, 0
    masks = [ones, right] if case.kind != "causal" else [ones, left]
    for first, other in (masks, masks[::-1]):
        graph = torch.jit.trace(call, (ids, first), check_trace=False, strict=False)
        for mask in (first, other):
            real = ones.bool() if case.kind == "seq2seq" else mask.bool()
            assert closeness(graph(ids, mask)[real], call(ids, mask)[real]) < 1e-5


@families("llama", "gpt2", "bert", "t5")
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_a_model_that_never_ran_can_be_exported(case: Case, strict: bool) -> None:
    if case.kind == "seq2seq" and strict:
        pytest.skip("one way is enough where two models are traced")
    call, ids = call_of(case, retrofitted(case)), tokens(2, 8)
    buckets._first_distances.cache_clear()
    buckets._buckets_around_zero.cache_clear()
    graph = torch.export.export(call, (ids, torch.ones_like(ids)), strict=strict).module()
    assert closeness(graph(ids, torch.ones_like(ids)), call(ids, torch.ones_like(ids))) < 1e-5


@torch.no_grad()
def test_exported_positions_are_an_argument(llama: PreTrainedModel) -> None:
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    given = {"attention_mask": mask, "position_ids": torch.arange(12)[None].repeat(2, 1), "use_cache": False}
    graph = torch.export.export(llama, (ids,), given, strict=False).module()
    given = {**given, "position_ids": RESTARTED}
    assert closeness(graph(ids, **given).logits, llama(ids, **given).logits) < 1e-5


def test_a_fake_pass_leaves_nothing_behind() -> None:
    """Shapes can be computed before any number was, and do no harm to a real pass that follows."""
    buckets._first_distances.cache_clear()
    buckets._buckets_around_zero.cache_clear()
    model = retrofitted(BY_NAME["llama"])
    with FakeTensorMode() as mode, torch.no_grad():
        fake: Any = type(model)(copy.deepcopy(model.config))
        for positions in (None, mode.from_tensor(torch.tensor([[0, 1, 2, 0, 1]]))):
            cache = DynamicCache(config=model.config)
            for part in (tokens(1, 5), tokens(1, 1)):
                at = None if positions is None else positions[:, : part.shape[1]]
                logits = fake(mode.from_tensor(part), position_ids=at, past_key_values=cache).logits
                assert logits.shape == (1, part.shape[1], model.config.vocab_size)
    with torch.no_grad():
        assert type(model(tokens(1, 5)).logits) is Tensor
