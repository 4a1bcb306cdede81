"""Every arm on every causal family: it leaves the source alone, and is what it says, or says why it does not apply."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.comparison.arm import Situation, twin
from rpb_retrofit.comparison.arms import ARMS, parse
from rpb_retrofit.diagnosis.intervention import Change, changed
from rpb_retrofit.errors import ConfigError, RetrofitError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import TABLE
from tests.families.cases import CASES, Case
from tests.support.tiny_models import VOCAB, build

CONTEXT, TARGET = 64, 160
CAUSAL = [case for case in CASES if case.kind == "causal"]
SCALINGS = ("linear", "dynamic", "ntk", "base", "yarn", "longrope", "llama3")
T5 = [name for name in ARMS if name.startswith("t5")]
every_case = pytest.mark.parametrize("case", CAUSAL, ids=str)


def source_of(case: Case, layers: int = 2) -> PreTrainedModel:
    whole = {"rotary_pct": 1.0} if case.family == "gpt_neox" else {}  # a quarter of so few dimensions is one frequency
    model = build(case, layers=layers, **whole)
    if "rope_parameters" not in case.settings:  # these came with a context of their own
        model.config.max_position_embeddings = CONTEXT
    return model


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def applied(name: str, source: PreTrainedModel, target: int = TARGET) -> tuple[PreTrainedModel, str]:
    """The arm in a twin of the source, and how a user gets it."""
    arm, number = parse(name if not ARMS[name.partition(":")[0]].needed or ":" in name else f"{name}:20000")
    model = twin(source, shared=not arm.rewrites)
    windows = [text(CONTEXT, seed) for seed in range(3)]
    how = arm.apply(model, Situation(source, target, windows, number))
    return model.eval(), how


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0]


def expected(case: Case) -> set[str]:
    """The arms that apply, from what is known of the family."""
    rotates = not case.alibi and case.family not in ("gpt2", "opt", "bert", "bart")
    scaled = case.settings.get("rope_parameters", {}).get("rope_type") or case.family == "gpt_oss"
    own_attention = bool(case.alibi) or case.name == "falcon-rope"
    names = {"source", "none", *T5}
    names |= {*SCALINGS} if rotates and not scaled else set()
    names |= set() if rotates or case.alibi else {"interpolated"}
    names |= set() if case.alibi else {"alibi"}
    names |= set() if own_attention else {"none-log-n"}
    if not rotates or own_attention:
        names -= {"t5-content", "t5-kept-log"}
    if not rotates:
        names -= {"t5-kept"}
    return names


@every_case
def test_arms_that_apply_run_and_leave_the_source_alone(case: Case) -> None:
    source, ids = source_of(case), text(24)
    before, weights = logits(source, ids), {k: v.clone() for k, v in source.state_dict().items()}
    config = source.config.to_dict()
    applicable, refusals = set(), dict[str, str]()
    for name in ARMS:
        try:
            model, how = applied(name, source)
        except RetrofitError as error:
            refusals[name] = str(error)
            continue
        applicable.add(name)
        assert how and "\n" not in how
        if name != "source" and source.config.max_position_embeddings == CONTEXT:
            assert logits(model, text(TARGET)).isfinite().all(), name
        unchanged = sum(p.data_ptr() in {q.data_ptr() for q in source.parameters()} for p in model.parameters())
        assert unchanged >= len(list(source.parameters())) / 2, f"{name} shares its weights with the source"
    assert applicable == expected(case), refusals
    assert all("\n" not in why and len(why) > 20 for why in refusals.values())
    assert torch.equal(logits(source, ids), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in source.state_dict().items())
    assert source.config.to_dict() == config


@pytest.mark.parametrize("case", [c for c in CAUSAL if "linear" in expected(c)], ids=str)
@pytest.mark.parametrize("name", SCALINGS)
def test_a_rope_scaling_is_transformers_own(case: Case, name: str) -> None:
    """A model that Transformers makes from the arm's config computes the same."""
    model, how = applied(name, source := source_of(case))
    plain = type(source)(type(source.config).from_dict(model.config.to_dict())).eval()
    plain.load_state_dict(source.state_dict())
    for ids in (text(24), text(TARGET)):
        assert torch.equal(logits(model, ids), logits(plain, ids))
    assert "rope_parameters" in how
    assert not torch.equal(logits(model, text(TARGET)), logits(source, text(TARGET)))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_short_texts_lose_nothing_where_the_scaling_waits_for_long_ones(name: str) -> None:
    source = source_of(CAUSAL[0])
    model, _ = applied(name, source)
    if name == "longrope":  # its score factor is constant
        model.model.rotary_emb.attention_scaling = 1.0
    torch.testing.assert_close(logits(model, text(CONTEXT)), logits(source, text(CONTEXT)))


def test_ntk_turns_the_lowest_frequency_slower_by_the_factor() -> None:
    model, _ = applied("ntk:4", source := source_of(CAUSAL[0]))
    ratio = source.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(4)


def test_local_layers_keep_their_rotation() -> None:
    (case,) = (c for c in CAUSAL if c.family == "gemma3_text")
    model, _ = applied("linear:2", source := source_of(case))
    rotary, scaled_rotary = model.model.rotary_emb, source.model.rotary_emb
    assert torch.equal(rotary.sliding_attention_inv_freq, scaled_rotary.sliding_attention_inv_freq)
    assert torch.equal(2 * rotary.full_attention_inv_freq, scaled_rotary.full_attention_inv_freq)


@pytest.mark.parametrize("case", [c for c in CAUSAL if not c.alibi and c.family != "llama4_text"], ids=str)
def test_without_positions_the_order_of_what_came_before_is_lost(case: Case) -> None:
    source = source_of(case, layers=1)
    if hasattr(source.config, "sliding_window"):
        source.config.sliding_window = 99
    ids = text(9)
    shuffled = torch.cat([ids[torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])], ids[8:]])
    model, _ = applied("none", source)
    torch.testing.assert_close(logits(model, shuffled)[-1], logits(model, ids)[-1], atol=1e-4, rtol=1e-4)
    assert (logits(source, shuffled)[-1] - logits(source, ids)[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("case", [c for c in CAUSAL if "none-log-n" in expected(c)], ids=str)
def test_the_length_factor(case: Case) -> None:
    """Nothing within the context, log n / log context beyond it, in one pass and with a cache."""
    source = source_of(case)
    context = Situation(source, TARGET).context
    (plain, _), (model, _) = applied("none", source), applied("none-log-n", source)
    torch.testing.assert_close(logits(model, text(context)), logits(plain, text(context)))
    ids = text(context + 30)
    if not case.settings.keys() & {"sliding_window", "attention_chunk_size"}:  # there the window bounds what is seen
        with changed(Anatomy.of(plain), Change(trained=context)):
            wanted = logits(plain, ids)
        torch.testing.assert_close(logits(model, ids), wanted, atol=2e-4, rtol=1e-4)
    assert (logits(plain, ids) - logits(model, ids)).abs().max() > (1e-3 if case.family != "mistral" else -1)
    with torch.no_grad():
        cached = model(input_ids=ids[None, :-1], use_cache=True).past_key_values
        last = model(input_ids=ids[None, -1:], past_key_values=cached, use_cache=True).logits[0, -1]
    torch.testing.assert_close(last, logits(model, ids)[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [c for c in CAUSAL if "alibi" in expected(c) and c.name != "falcon-rope"], ids=str)
def test_alibi_is_exact(case: Case) -> None:
    """A table with one bucket for each distance says the same, through T5's own way; slopes as Bloom has them."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    length = 48
    source = source_of(case)
    model, _ = applied("alibi", source)
    slopes = build_alibi_tensor(torch.ones(1, 2), 4, torch.float64)[:, 0, 1]
    table = copy.deepcopy(source)
    buckets = {"relative_attention_num_buckets": 2 * length, "relative_attention_max_distance": 4 * length}
    rpb.retrofit(table, rpb.RetrofitConfig(init="zeros", **buckets))
    for module in Anatomy.of(table).attentions.values():
        exact = -slopes[:, None] * torch.arange(2 * length)
        getattr(module, TABLE).weight.data.copy_(exact)
    ids = text(length)
    torch.testing.assert_close(logits(model, ids), logits(table.eval(), ids), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        out = model.generate(ids[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
    again = logits(model, out)[length - 1 : -1].argmax(-1)
    # BART is made to end with a certain token.
    assert torch.equal(again[:-1], out[length:-1]), "decoding with a cache is what one pass computes"


@pytest.mark.parametrize("case", [c for c in CAUSAL if "interpolated" in expected(c)], ids=str)
def test_interpolated_positions(case: Case) -> None:
    source = source_of(case)
    model, _ = applied("interpolated", source)
    name = next(n for n, p in source.named_parameters() if p.shape[0] == CONTEXT + case.unused_rows and "norm" not in n)
    before, after = source.get_parameter(name)[case.unused_rows :], model.get_parameter(name)[case.unused_rows :]
    assert len(after) == TARGET
    assert torch.equal(after[0], before[0]) and torch.allclose(after[-1], before[-1])
    at = torch.arange(TARGET, dtype=torch.float64) * (CONTEXT - 1) / (TARGET - 1)
    low = at.floor().long().clamp(max=CONTEXT - 2)
    share = (at - low)[:, None]
    wanted = (1 - share) * before[low].double() + share * before[low + 1].double()
    torch.testing.assert_close(after.double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", T5)
def test_a_t5_arm_is_the_retrofit_that_its_command_makes(name: str) -> None:
    """The options that it prints, given to `retrofit`, make the same model."""
    source = source_of(CAUSAL[0])
    model, how = applied(name, source)
    words = how.removeprefix("rpb retrofit SOURCE OUT").split()
    given = {
        key.removeprefix("--").replace("-", "_"): value for key, value in zip(words[::2], words[1::2], strict=True)
    }
    names = {"buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance"}
    settings = {names.get(k, k): int(v) if v.isdecimal() else v for k, v in given.items()}
    other, config = copy.deepcopy(source), rpb.RetrofitConfig(**settings)
    windows = [text(CONTEXT, seed) for seed in range(3)]
    rpb.retrofit(other, config, calibration=windows if config.takes_text else None)
    torch.testing.assert_close(logits(model, text(TARGET)), logits(other.eval(), text(TARGET)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yran", "did you mean 'yarn'"),
        ("rotary-please", "choose from source, linear"),
        ("base", "it takes a number, the base, as in 'base:500000'"),
        ("alibi:3", "'alibi' takes no number"),
        ("yarn:x", "'x' is no factor above 0"),
        ("yarn:-2", "'-2' is no factor above 0"),
        ("yarn:inf", "'inf' is no factor above 0"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match="arm '") as caught:
        parse(name)
    assert message in str(caught.value)


def test_a_target_within_the_context_scales_nothing() -> None:
    with pytest.raises(ConfigError, match="lies within the context of 64"):
        applied("yarn", source_of(CAUSAL[0]), target=32)
    applied("yarn:2", source_of(CAUSAL[0]), target=32)
