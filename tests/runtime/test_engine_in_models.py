"""The attention engine under whole models: which way runs, masks, compilation, autocast, several processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import rpb_retrofit as rpb
from rpb_retrofit.runtime.anatomy import Anatomy
from tests.families.cases import BY_NAME, Case
from tests.support.memory import most_allocated
from tests.support.tiny_models import CONFIG, build, closeness, families, inputs_of, retrofitted, tokens, ways


def gradients(model: Any, inputs: dict[str, Any], of: PreTrainedModel | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in (of or model).named_parameters() if p.grad is not None}


def same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert any("relative_attention_bias" in name for name in want)
    largest = max(gradient.abs().max().item() for gradient in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@families("llama", "mistral", "gemma3_text", "llama4_text", "phi", "deepseek_v3", "gpt2", "opt", "bert", "bart", "t5")
@torch.no_grad()
def test_prompts_and_padding_take_the_fast_way(case: Case) -> None:
    """Windows, chunks and padding are no reason for a slow one."""
    model = retrofitted(case)
    inputs = inputs_of(case, tokens())
    for padding in (None, torch.ones_like(inputs["input_ids"]).index_fill(1, torch.arange(3), 0)):
        if padding is not None:
            inputs["attention_mask"] = padding
        model(**inputs)
        names = ways(model)
        assert set(names) == {"blockwise"}
        assert sum(names.values()) == (4 if case.kind == "seq2seq" else 2)


@families("llama", "gpt2")
@torch.no_grad()
def test_decoding_takes_one_row(case: Case) -> None:
    model, cache = retrofitted(case), DynamicCache()
    model(tokens()[:, :5], past_key_values=cache)
    model(tokens()[:, 5:6], past_key_values=cache)
    assert set(ways(model)) == {"row"}


@families("llama", "qwen3", "mistral")
def test_packed_documents_are_documents_of_their_own(case: Case) -> None:
    """Positions that begin again separate documents; neither outputs nor gradients cross."""
    model, ids = retrofitted(case), tokens()[:1]
    cuts = [0, 5, 6, 14, ids.shape[1]]
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(cuts)])[None]
    alone = [model(ids[:, a:b]).logits for a, b in itertools.pairwise(cuts)]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert set(ways(model)) == {"blockwise"}
    assert closeness(packed.detach(), torch.cat(alone, 1).detach()) < 1e-5
    upstream = torch.randn_like(packed)
    weights = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(packed, weights, upstream, allow_unused=True)
    want = torch.autograd.grad(torch.cat(alone, 1), weights, upstream, allow_unused=True)
    for actual, expected in zip(got, want, strict=True):
        if expected is not None:
            assert closeness(actual, expected) < 1e-4


@families("llama", "mistral", "gpt2", "bert", "bart", "t5")
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_gradients(case: Case, padded: bool) -> None:
    """One graph, forward and backward, with the same gradients."""
    torch._dynamo.reset()
    model, inputs = retrofitted(case), inputs_of(case, tokens())
    if padded:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"]).index_fill(1, torch.arange(3), 0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same_gradients(gradients(compiled, inputs, of=model), gradients(model, inputs))


@families("llama", "gpt2")
def test_layers_compiled_one_by_one(case: Case) -> None:
    """As regional compilation does: no layer has a graph break, and the gradients are the same, tails' too."""
    torch._dynamo.reset()
    models = [build(case), build(case)]
    for model in models:
        rpb.retrofit(model, replace(CONFIG, init="normal", tail="log"))
        for name, parameter in model.named_parameters():
            if name.endswith(".tail"):  # some of them above zero
                parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    for name in Anatomy.of(models[0]).blocks:
        models[0].get_submodule(name).compile(backend="aot_eager", fullgraph=True)
    got, want = (gradients(model, inputs_of(case, tokens())) for model in models)
    same_gradients(got, want)
    assert any(name.endswith(".tail") and gradient.any() for name, gradient in want.items())


@families("llama", "gemma3_text")
@torch.no_grad()
def test_compiled_decoding_from_a_static_cache(case: Case) -> None:
    """No more graphs than the source takes: what the bias needs of the cache's length stays a tensor."""

    def decode(model: PreTrainedModel) -> tuple[Tensor, int]:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = torch.compile(model, backend=counter, fullgraph=True)
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 4)
        model(ids[:, :6], past_key_values=cache)
        steps = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, ids.shape[1])]
        return torch.cat(steps, 1), counter.frame_count

    ids, model = tokens(), retrofitted(case)
    got, graphs = decode(model)
    assert closeness(got, model(ids).logits[:, 6:]) < 1e-5
    assert graphs == decode(build(case))[1]


@families("llama", "bert", "gpt2")
def test_autocast(case: Case) -> None:
    """Products in bfloat16; tables and their gradients in float32."""
    model, inputs = retrofitted(case), inputs_of(case, tokens())
    want = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs).logits
        got = gradients(model, inputs)
    assert set(ways(model)) == {"blockwise"}
    assert closeness(out.detach().float(), model(**inputs).logits.detach()) < 0.1
    for name in want:
        if "relative_attention_bias" in name:
            assert got[name].dtype == torch.float32
            assert closeness(got[name], want[name]) < 0.1


@families("llama", "bert", "t5")
@torch.no_grad()
def test_no_tensor_of_pairs_is_made(case: Case) -> None:
    """Padded, too: a mask or a bias of 3,000 x 3,000 would take 9 MB in booleans, and 144 MB in numbers."""
    model = retrofitted(case)
    ids = torch.randint(tokens().max().item(), (2, 3000)) if case.family != "bert" else tokens()
    mask = torch.ones_like(ids).index_fill(1, torch.arange(3), 0)
    inputs = {"input_ids": ids, **({"decoder_input_ids": tokens()} if case.kind == "seq2seq" else {})}
    base = getattr(model, "model", model)
    base = base if case.kind == "causal" else model
    model(**{**inputs, "attention_mask": mask})  # what is made once is not counted
    peak = most_allocated(lambda: base(**{**inputs, "attention_mask": mask}))
    assert peak < 60e6


@pytest.mark.process
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_make_the_gradients_of_one(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.distributed_worker", way]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous"), str(tmp_path / "gradients")],
            cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:  # one that waits for another in vain would wait on
        for process in processes:
            process.kill()
    got = torch.load(tmp_path / "gradients")
    model = retrofitted(BY_NAME["llama"]).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    same_gradients(got, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
