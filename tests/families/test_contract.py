"""The contract that every supported family must pass, on a tiny random model made from its config."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError, MissingTablesError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import FAMILIES
from tests.families.cases import CASES, Case
from tests.families.reference import float64_copy, with_bias
from tests.support.tiny_models import (
    AUTO,
    CONFIG,
    LENGTH,
    MAX_DISTANCE,
    build,
    closeness,
    every_family,
    inputs_of,
    retrofitted,
    saved_config,
    tokens,
)


@torch.no_grad()
def order_effect(case: Case, model: PreTrainedModel) -> float:
    """By how much permuting all other tokens moves the last token's logits; of both sides where there are two."""
    ids = tokens(1, 7)
    permuted = torch.cat([ids[:, torch.tensor([3, 0, 5, 1, 4, 2])], ids[:, -1:]], 1)
    effect = closeness(model(**inputs_of(case, permuted)).logits[:, -1], model(**inputs_of(case, ids)).logits[:, -1])
    if case.kind != "seq2seq":
        return effect
    start = torch.tensor([[1]])
    before = model(input_ids=ids, decoder_input_ids=start).logits
    after = model(input_ids=permuted, decoder_input_ids=start).logits
    return max(effect, closeness(after, before))


@every_family
def test_1_mechanism_is_gone(case: Case) -> None:
    source = build(case, layers=1)
    assert order_effect(case, source) > 1e-3
    assert order_effect(case, retrofitted(case, random_tables=False, layers=1)) < 1e-5


@every_family
@torch.no_grad()
def test_2_logits_equal_the_float64_reference(case: Case) -> None:
    source, model = build(case), retrofitted(case)
    tables = {
        n: m.relative_attention_bias.weight for n, m in model.named_modules() if hasattr(m, "relative_attention_bias")
    }
    ids = tokens()
    padded = torch.ones_like(ids)
    if case.kind == "causal":
        padded[1, :5] = 0  # left, as generation pads
        extra = {"attention_mask": padded}
    elif case.kind == "encoder":
        padded[1, 15:] = 0
        extra = {"attention_mask": padded}
    else:
        extra = {"attention_mask": torch.tensor([[1] * 11, [1] * 7 + [0] * 4])}
    inputs = inputs_of(case, ids, **extra)
    reference = float64_copy(case, source)
    own = source(**inputs).logits.double()
    with with_bias(case, reference, tables, MAX_DISTANCE):
        want = reference(**inputs).logits
    got, real = model(**inputs).logits.double(), padded.bool()
    assert closeness(own[real], want[real]) > 1e-2, "the reference itself must notice the swap"
    assert closeness(got[real], want[real]) < 2e-5


@every_family
@torch.no_grad()
def test_3_cached_decoding_equals_the_full_pass(case: Case) -> None:
    if case.kind == "encoder":
        pytest.skip("encoders have no cache")
    model, ids = retrofitted(case), tokens()
    inputs = inputs_of(case, ids)
    full = model(**inputs, use_cache=False).logits
    cache: Any = DynamicCache(config=model.config)
    name = "input_ids"
    if case.kind == "seq2seq":
        cache, name = EncoderDecoderCache(cache, DynamicCache(config=model.config)), "decoder_input_ids"
    steps, start = [], 0
    for end in (6, 7, 8, 12, *range(13, LENGTH + 1)):  # a prompt, single tokens, a chunk
        out = model(**{**inputs, name: ids[:, start:end]}, past_key_values=cache, use_cache=True)
        steps, start = [*steps, out.logits], end
    assert closeness(torch.cat(steps, 1), full) < 1e-5


@every_family
@torch.no_grad()
def test_4_padding_changes_nothing(case: Case) -> None:
    model, ids = retrofitted(case), tokens(1)
    pad = torch.zeros(1, 6, dtype=torch.long)
    if case.kind == "causal":
        padded = torch.cat([pad, ids], 1)
        got = model(padded, attention_mask=(padded != 0).long()).logits[:, 6:]
        want = model(ids).logits
    elif case.kind == "encoder":
        padded = torch.cat([ids, pad], 1)
        got = model(padded, attention_mask=(padded != 0).long()).logits[:, :-6]
        want = model(ids).logits
    else:
        padded = torch.cat([ids, pad], 1)
        start = tokens(1, 5, seed=3)
        got = model(padded, attention_mask=(padded != 0).long(), decoder_input_ids=start).logits
        want = model(ids, decoder_input_ids=start).logits
    assert closeness(got, want) < 1e-5


@pytest.fixture(scope="session")
def plain_process() -> Iterator[Callable[[dict], dict]]:
    """A process in which rpb_retrofit cannot be imported."""
    script = Path(__file__).with_name("plain_process.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(request: dict) -> dict:
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield ask
    stdin.close()
    process.wait()


@pytest.mark.process
@every_family
@torch.no_grad()
def test_5_reload_three_ways(case: Case, tmp_path: Path, plain_process: Callable[[dict], dict]) -> None:
    model, inputs = retrofitted(case), inputs_of(case, tokens())
    want = model(**inputs).logits
    model.save_pretrained(tmp_path / "out")

    loaded = rpb.load(tmp_path / "out").eval()
    assert torch.equal(loaded(**inputs).logits, want)
    by_head = rpb.load(tmp_path / "out", getattr(transformers, AUTO[case.kind])).eval()
    assert torch.equal(by_head(**inputs).logits, want)

    torch.save(inputs, tmp_path / "inputs")
    request = {"folder": str(tmp_path / "out"), "inputs": str(tmp_path / "inputs")}
    reply = plain_process({**request, "auto": AUTO[case.kind], "concrete": case.model})
    assert "error" not in reply, reply
    # Another process: the same weights, but where they lie in memory decides how a matrix product rounds.
    assert closeness(torch.load(reply["logits"]), want) < 1e-6
    for how, error in reply["plain"].items():
        assert error and "rpb_retrofit.load(path)" in error and "trust_remote_code=True" in error, (how, error)

    loaded.save_pretrained(tmp_path / "again")
    assert saved_config(tmp_path / "again") == saved_config(tmp_path / "out")
    first, second = (safe_open(tmp_path / f / "model.safetensors", "pt") for f in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys())


@every_family
@torch.no_grad()
def test_6_revert_is_bit_exact(case: Case) -> None:
    model, inputs = build(case), inputs_of(case, tokens())
    want, names, config = model(**inputs).logits, list(model.state_dict()), copy.deepcopy(model.config.to_dict())
    rpb.retrofit(model, CONFIG)
    assert not torch.equal(model(**inputs).logits, want)
    rpb.revert(model)
    assert torch.equal(model(**inputs).logits, want)
    assert list(model.state_dict()) == names and model.config.to_dict() == config
    assert type(model).__name__ == case.model


@every_family
def test_7_gradients(case: Case) -> None:
    def with_gradient(model: PreTrainedModel) -> set[str]:
        ids = tokens()
        model(**inputs_of(case, ids), labels=ids).loss.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    source, model = build(case), retrofitted(case)
    before, after = with_gradient(source), with_gradient(model)
    tables = {name for name in after if name.endswith("relative_attention_bias.weight")}
    assert len(tables) == sum(getattr(model.config, name) for name in case.layers)
    for name in tables:
        assert model.get_parameter(name).grad.abs().max() > 0, name
    assert before - after - tables == set()


@pytest.mark.process
@every_family
def test_8_missing_tables_are_an_error(case: Case, tmp_path: Path, plain_process: Callable[[dict], dict]) -> None:
    model = retrofitted(case)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with safe_open(weights, "pt") as file:
        kept = {key: file.get_tensor(key) for key in file.keys() if "relative_attention_bias" not in key}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(MissingTablesError, match="lacks"):
        rpb.load(tmp_path)
    request = {"folder": str(tmp_path), "inputs": "", "auto": AUTO[case.kind], "concrete": case.model}
    assert "MissingTablesError" in plain_process(request).get("error", "")


@every_family
@torch.no_grad()
def test_9_the_bias_follows_the_positions_given(case: Case) -> None:
    """Where Transformers' model takes ``position_ids``: in one pass and, of a decoder, with a cache."""
    model, ids = retrofitted(case), tokens(2, 8)
    if not Anatomy.of(model).positioned:
        assert "position_ids" not in inspect.signature(getattr(transformers, case.model).forward).parameters
        with pytest.raises(ConfigError, match=f"position_ids: Rpb{case.model} takes no positions"):
            model(**inputs_of(case, ids), position_ids=torch.arange(8)[None])
        return
    if case.kind == "encoder":
        order = torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])
        got = model(ids[:, order], position_ids=order[None]).logits
        assert closeness(got, model(ids).logits[:, order]) < 1e-5
        return
    # Two continuations of a shared beginning stand in one row, and neither sees the other.
    positions, mask = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]]), torch.ones(8, 8, dtype=torch.bool).tril()
    mask[6:, 4:6] = False
    alone = [model(ids[:, at]).logits for at in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7])]
    want = torch.cat([alone[0], alone[1][:, 4:]], 1)
    added = torch.zeros(8, 8).masked_fill(~mask, torch.finfo(torch.float32).min)
    for whole in (mask, added):
        given = {"position_ids": positions, "attention_mask": whole[None, None]}
        if case.alibi == "build_alibi_tensor":  # Falcon's slopes come from the mask, and it takes one of two dimensions
            continue
        assert closeness(model(ids, **given, use_cache=False).logits, want) < 1e-5
        cache, steps = DynamicCache(config=model.config), []
        for start, end in ((0, 3), (3, 4), (4, 7), (7, 8)):
            given = {
                "position_ids": positions[:, start:end],
                "attention_mask": whole[None, None, start:end, :end].contiguous(),
            }
            steps.append(model(ids[:, start:end], **given, past_key_values=cache).logits)
        assert closeness(torch.cat(steps, 1), want) < 1e-5
    # Padding between what is cached and its continuation: only the cache knows where its keys stand.
    cache, real = DynamicCache(config=model.config), torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1]]).expand(2, -1)
    model(ids[:, :4], past_key_values=cache)
    got = model(
        torch.cat([0 * ids[:, :2], ids[:, 4:6]], 1),
        attention_mask=real,
        position_ids=torch.tensor([[0, 0, 4, 5]]),
        past_key_values=cache,
    ).logits[:, 2:]
    assert closeness(got, alone[0][:, 4:]) < 1e-5


def test_every_row_is_under_contract() -> None:
    assert {case.family for case in CASES} == set(FAMILIES)
