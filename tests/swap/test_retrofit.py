"""A retrofit as an object: what it refuses, and what Transformers and torch may do to it without losing the bias."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.errors import (
    AlreadyRetrofittedError,
    AttentionImplementationError,
    NotRetrofittedError,
    PartialMatchError,
    RetrofitError,
    RevertError,
    UnsupportedModelError,
)
from tests.families.cases import BY_NAME, Case
from tests.support.tiny_models import CONFIG, build, closeness, every_family, families, inputs_of, retrofitted, tokens

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def is_table(name: str) -> bool:
    return name.endswith("relative_attention_bias.weight")


@torch.no_grad()
def logits(case: Case, model: PreTrainedModel) -> Tensor:
    return model(**inputs_of(case, tokens())).logits


# --- what would drop the bias is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_other_attention_implementation(implementation: str, tmp_path: Path) -> None:
    model = retrofitted(BY_NAME["llama"])
    model.save_pretrained(tmp_path)
    ways: list[Callable[[], Any]] = [
        lambda: model.set_attn_implementation(implementation),
        lambda: model.model.set_attn_implementation(implementation),
        lambda: rpb.load(tmp_path, attn_implementation=implementation),
        lambda: AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=implementation, trust_remote_code=True
        ),
    ]
    for way in ways:
        # The checkpoint's own code has error classes of its own: the name and the words are the contract.
        with pytest.raises(ValueError, match=f"'{implementation}' would drop the relative position bias") as error:
            way()
        assert type(error.value).__name__ == AttentionImplementationError.__name__
    before = logits(BY_NAME["llama"], model)
    model.set_attn_implementation("rpb_retrofit")
    assert torch.equal(logits(BY_NAME["llama"], model), before)


@families("llama", "gpt2", "bert", "bart", "bloom")
def test_an_implementation_set_behind_its_back(case: Case) -> None:
    model = retrofitted(case)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = "sdpa"
    with pytest.raises(AttentionImplementationError):
        logits(case, model)


# --- what must not change the logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load", "to", "half"])
def test_tables_stay_float32(how: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    model = retrofitted(case)
    want = logits(case, model)
    model.save_pretrained(tmp_path)
    if how == "load":
        model = rpb.load(tmp_path, dtype=torch.bfloat16)
    else:
        model = model.to(torch.bfloat16) if how == "to" else model.half()
    reloaded = rpb.load(tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_table(name) else model.dtype), name
        assert not is_table(name) or torch.equal(parameter, reloaded.get_parameter(name))
    assert model.dtype != torch.float32
    assert closeness(logits(case, model).float(), want) < 0.05


@families("llama", "bert", "t5", "bloom")
def test_copies(case: Case, tmp_path: Path) -> None:
    model = retrofitted(case)
    torch.save(model, tmp_path / "whole")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole", weights_only=False)):
        assert type(other) is type(model)
        assert torch.equal(logits(case, other), logits(case, model))
        next(p for name, p in other.named_parameters() if is_table(name)).data.add_(torch.randn(4, 8))
        assert not torch.equal(logits(case, other), logits(case, model)), "the copy must not read the original's table"


@families("llama", "bert", "gpt2", "t5", "bloom", "mpt", "falcon")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(case: Case, use_reentrant: bool) -> None:
    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        model.train()
        torch.manual_seed(0)  # the same dropout
        model(**inputs_of(case, tokens()), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    # In float64: how float32 rounds when a layer runs again is the machine's affair, and on some exceeds the bounds.
    plain, checkpointed = retrofitted(case).double(), retrofitted(case).double()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    want, got = gradients(plain), gradients(checkpointed)
    assert want.keys() == got.keys() and any(map(is_table, want))
    largest = max(gradient.abs().max().item() for gradient in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@every_family
@torch.no_grad()
def test_attentions_and_hidden_states(case: Case) -> None:
    """Asking for them returns them, as the source's eager attention does, and leaves the logits alone."""
    model = retrofitted(case)
    out = model(**inputs_of(case, tokens()), output_attentions=True, output_hidden_states=True)
    assert closeness(out.logits, logits(case, model)) < 2e-5
    sides = ("encoder_", "decoder_") if case.kind == "seq2seq" else ("",)
    for side in sides:
        weights, states = out[f"{side}attentions"], out[f"{side}hidden_states"]
        assert len(weights) == 2 and len(states) == 3
        for layer in weights:
            assert layer.shape[:2] == (2, 4) and layer.shape[2] == layer.shape[3]
            total = layer.sum(-1)
            if case.family == "gpt_oss":  # its sinks take a share
                assert total.max() < 1 + 1e-5 and total.min() < 0.9
            else:
                assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


# As for its source, the rotary embedding of a type that depends on the length branches on data.
@families("llama", "mistral", "gemma3_text", "gpt2", "bloom", "mpt", "falcon", "bert", "bart", "t5")
def test_compile_has_no_graph_breaks(case: Case) -> None:
    torch._dynamo.reset()
    model = retrofitted(case)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert closeness(logits(case, compiled), logits(case, model)) < 1e-5
    compiled(**inputs_of(case, tokens())).logits.square().mean().backward()
    assert any(is_table(name) and p.grad.abs().max() > 0 for name, p in model.named_parameters() if p.grad is not None)


# --- one table for all layers --------------------------------------------------------------------------------------


@families("llama", "gpt2", "bart")
def test_shared_tables(case: Case, tmp_path: Path) -> None:
    model = build(case)
    report = rpb.retrofit(model, rpb.RetrofitConfig(**{**vars(CONFIG), "shared": True}))
    directions = 2 if case.kind == "seq2seq" else 1  # the encoder's looks both ways
    assert len(report.tables) == directions and report.parameters_added == directions * 4 * 8
    with torch.no_grad():
        for name in report.tables:
            model.get_parameter(name).normal_()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sorted(filter(is_table, file.keys())) == sorted(report.tables)
    auto = getattr(transformers, "AutoModelForSeq2SeqLM" if case.kind == "seq2seq" else "AutoModelForCausalLM")
    for loaded in (rpb.load(tmp_path), auto.from_pretrained(tmp_path, trust_remote_code=True)):
        assert torch.equal(logits(case, loaded.eval()), logits(case, model))
        tables = [p for name, p in loaded.named_parameters(remove_duplicate=False) if is_table(name)]
        assert len(tables) == len(report.layers_patched) and len(set(map(id, tables))) == directions


# --- errors --------------------------------------------------------------------------------------------------------


def test_revert_knows_when_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(NotRetrofittedError, match="is not a retrofit: nothing to revert"):
        rpb.revert(build(BY_NAME["llama"]))

    build(BY_NAME["llama"]).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    rpb.retrofit(model, CONFIG)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(RevertError, match=f"load the source again from '{re.escape(str(tmp_path / 'source'))}'"):
        rpb.revert(rpb.load(tmp_path / "out"))

    model(tokens(), labels=tokens()).loss.backward()
    tables = [p for name, p in model.named_parameters() if is_table(name)]
    torch.optim.SGD(tables, lr=0.1).step()
    with pytest.raises(RevertError, match="loaded or copied"):
        rpb.revert(copy.deepcopy(model))
    rpb.revert(model)  # the tables are not the source's: they may change
    rpb.retrofit(model, CONFIG)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RevertError, match="of the source's parameters changed since the retrofit"):
        rpb.revert(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bert", "bloom", "t5"])
@pytest.mark.parametrize("where", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_a_model_without_values(where: Callable[[], Any], name: str) -> None:
    """It is retrofitted, described, run and reverted as any other; what needs values says that there are none."""
    with where():
        model = build(BY_NAME[name])
        before = type(model), list(model.state_dict())
        rpb.retrofit(model, CONFIG)
        assert "RelativePositionBias(heads=4, buckets=8, max_distance=16" in repr(model)
        ids = torch.zeros(2, 12, dtype=torch.long)
        assert model(**inputs_of(BY_NAME[name], ids)).logits.shape[:2] == (2, 12)
        rpb.revert(model)
        assert (type(model), list(model.state_dict())) == before
        if name != "t5":
            with pytest.raises(UnsupportedModelError, match="without a value to go by: load the weights"):
                rpb.retrofit(model, rpb.RetrofitConfig(), calibration=[torch.zeros(64, dtype=torch.long)])


def quantised(model: PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}


def without_self_attention(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn = nn.Identity()


def already(model: PreTrainedModel) -> None:
    rpb.retrofit(model, CONFIG)


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, state_size=4))


@pytest.mark.parametrize(
    ("make", "change", "error", "words"),
    [
        (None, quantised, UnsupportedModelError, r"is quantised \(gptq\)"),
        (None, already, AlreadyRetrofittedError, "is a retrofit already"),
        (None, without_self_attention, PartialMatchError, r"1 of 2 layers .* without: model\.layers\.1$"),
        (mamba, lambda model: None, UnsupportedModelError, "model type 'mamba' has no positional mechanism"),
    ],
    ids=["quantised", "already", "partial", "mamba"],
)
def test_refused_and_unchanged(
    make: Callable[[], PreTrainedModel] | None,
    change: Callable[[PreTrainedModel], None],
    error: type[RetrofitError],
    words: str,
) -> None:
    model = make() if make else build(BY_NAME["llama"])
    change(model)

    def state() -> tuple[Any, ...]:
        hooks = [list(module._forward_pre_hooks.values()) for module in model.modules()]
        return type(model), list(model.state_dict()), model.config.to_dict(), hooks, model.config._attn_implementation

    before = copy.deepcopy(state())
    with pytest.raises(error, match=words):
        rpb.retrofit(model, CONFIG)
    assert state() == before
