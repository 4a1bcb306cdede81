"""What a diagnosis rests on: exact provenance of tables, float32 for half precision, and what undoing brings."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis import full_precision
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.effect import LIKELIEST, Effect, predictions, scores
from rpb_retrofit.diagnosis.finding import Verdict
from rpb_retrofit.diagnosis.full_precision import in_float32
from rpb_retrofit.diagnosis.hypotheses import (
    foreign_tables,
    not_finite,
    off_by_one,
    offset_reversed,
    tables_not_loaded,
    weights_differ,
    wrong_scale,
)
from rpb_retrofit.diagnosis.intervention import attending_as
from rpb_retrofit.diagnosis.meanings import meanings_of
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.provenance import HEADS, LAYERS, ROW, UNKNOWN, alterations
from rpb_retrofit.diagnosis.shared_evidence import of_all
from rpb_retrofit.diagnosis.weights import trained
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables.checksums import KEY, checksums, record
from tests.diagnosis.small_model import language, retrofitted
from tests.families.cases import CASES
from tests.support.tiny_models import build


@pytest.fixture(scope="module")
def fitted(source: PreTrainedModel) -> PreTrainedModel:
    return retrofitted(source)


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda t: -t,
    "halved": lambda t: t / 2,
    "doubled": lambda t: t * 2,
    "scaled by 1/sqrt(d)": lambda t: t / 4,
    "scaled by sqrt(d)": lambda t: t * 4,
    "shifted by one bucket": lambda t: torch.cat([t[:, :1], t[:, :-1]], 1),
    "shifted by minus one bucket": lambda t: torch.cat([t[:, 1:], t[:, -1:]], 1),
    "far and near exchanged": lambda t: t.flip(1),
    HEADS: lambda t: t.roll(2, 0),
    ROW: lambda t: torch.cat([t[:2], -t[2:3], t[3:]]),
    UNKNOWN: lambda t: t + 0.01 * torch.arange(t.shape[1]) ** 2,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_became_of_a_table_is_told_exactly(mistake: str, fitted: PreTrainedModel) -> None:
    model = copy.deepcopy(fitted)
    assert alterations(Arms(model), 16) == {}, "nothing happened to it"
    name, bias = list(Arms(model).biases.items())[1]
    bias.weight.data.copy_(MISTAKES[mistake](bias.weight.data.clone()))
    assert alterations(Arms(model), 16) == {name: mistake}


def test_other_layers_tables_and_other_buckets(fitted: PreTrainedModel) -> None:
    model = copy.deepcopy(fitted)
    first, second = Arms(model).biases.values()
    second.weight.data.copy_(first.weight.data)
    assert set((alterations(Arms(model), 16) or {}).values()) == {LAYERS}
    model = copy.deepcopy(fitted)
    for bias in Arms(model).biases.values():
        bias.bucketing = bias.bucketing.__class__(bias.bucketing.num_buckets, 2 * bias.bucketing.max_distance, False)
    assert set((alterations(Arms(model), 16) or {}).values()) == {"made for the maximum distance 256"}


def test_checksums_travel_and_follow_what_is_written(fitted: PreTrainedModel, tmp_path: Any) -> None:
    fitted.save_pretrained(tmp_path / "saved")
    loaded = rpb.load(tmp_path / "saved")
    assert loaded.config.rpb_retrofit[KEY] == fitted.config.rpb_retrofit[KEY]
    assert alterations(Arms(loaded.eval()), 16) == {}
    settings = {key: value for key, value in loaded.config.rpb_retrofit.items() if key != KEY}
    loaded.config.rpb_retrofit = settings
    assert alterations(Arms(loaded), 16) is None, "an older retrofit has none"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(0, 31), st.floats(1e-6, 3.0))
def test_no_number_changes_unseen(head: int, bucket: int, change: float) -> None:
    buckets, table = Bucketing(32, 128, False), torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    other = table.clone()
    other[head, bucket] += change
    assert (checksums(table, None, buckets) == checksums(other, None, buckets)) == torch.equal(table, other)


def test_float32_for_a_while(source: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(source).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objects, ids = [id(p) for p in model.parameters()], language(64, 3)[None]
    with torch.no_grad():
        want, rounded = copy.deepcopy(model).float()(ids).logits, model(ids).logits
        with in_float32(model) as dtype:
            assert dtype == torch.float32 and [id(p) for p in model.parameters()] == objects
            assert torch.equal(model(ids).logits, want)
        assert torch.equal(model(ids).logits, rounded) and rounded.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    monkeypatch.setattr(full_precision, "SHARE", 0.0)
    with in_float32(model) as dtype:
        assert dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.bfloat16


def test_distance_is_the_divergence_of_predictions(source: PreTrainedModel, fitted: PreTrainedModel) -> None:
    documents = [language(600, 9)]
    assert source.config.vocab_size <= LIKELIEST, "so it is exact"
    losses, labels = predictions(source, documents, 64, 256, None)
    own = scores(fitted, documents, 64, 256, None, labels)
    with torch.no_grad():
        for window in range(4):
            ids = documents[0][None, 64 * window : 64 * window + 64]
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (source, fitted))
            want = (p.exp() * (p - q)).sum(-1)
            assert own.distance is not None
            assert torch.allclose(own.distance.losses[window].double(), want, atol=1e-5)
            target = ids[0, 1:, None]
            assert torch.allclose(losses.losses[window].double(), -p.gather(1, target)[:, 0], atol=1e-5)
    same = Effect.of(own, own)
    assert same.share == 0 and not same.sure


def test_heads_that_look_where_the_sources_do(source: PreTrainedModel, fitted: PreTrainedModel) -> None:
    """All heads of the first layer given back: what it hands on is the source's, as its values are."""
    model = copy.deepcopy(fitted)
    arms = Arms(model, source)
    name = next(iter(arms.attentions))
    seen: dict[str, Tensor] = {}
    for whose, module in (("source", source.get_submodule(name)), ("retrofit", arms.attentions[name])):
        module.register_forward_hook(lambda m, args, out, whose=whose: seen.__setitem__(whose, out[0]))
    ids = language(64, 3)[None]
    with torch.no_grad():
        source(ids)
        want = seen["source"]
        plain = model(ids).logits
        assert not torch.allclose(seen["retrofit"], want, atol=1e-3)
        with attending_as(arms, arms.source_anatomy, {name: torch.ones(4, dtype=torch.bool)}):
            model(ids)
            assert torch.allclose(seen["retrofit"], want, atol=1e-4)
        assert torch.equal(model(ids).logits, plain), "afterwards as before"


def test_training_moves_kinds_and_layers_damage_does_not() -> None:
    names = [f"model.layers.{n}.{kind}.weight" for n in range(4) for kind in ("q_proj", "k_proj")]
    adapters = {name: 0.01 * name.count("q_proj") for name in names}
    assert trained(adapters) == {name for name in names if "q_proj" in name}
    last = {name: 0.01 * name.count(".3.") for name in names}
    assert trained(last) == {name for name in names if ".3." in name}
    assert trained({**dict.fromkeys(names, 0.0), names[2]: 0.5}) == set()


def test_every_meaning_is_some_hypothesis_and_needs_no_source(fitted: PreTrainedModel) -> None:
    claimed = {*offset_reversed.MEANINGS, *off_by_one.MEANINGS, *wrong_scale.MEANINGS}
    bias = RelativePositionBias(2, Bucketing(8, 16, True))
    assert claimed == set(meanings_of(bias, bias.weight.detach(), 16))
    for what in ("negated", "far and near exchanged"):
        model = copy.deepcopy(fitted)
        for bias in Arms(model).biases.values():
            bias.weight.data.copy_(MISTAKES[what](bias.weight.data.clone()))
        measurements = Measurements(
            Arms(model), [language(600, 9)], None, DiagnosisPlan(lengths=(64,), tokens=512, probed=128)
        )
        result = (wrong_scale if what == "negated" else offset_reversed).examine(measurements)
        assert result.verdict is Verdict.CONFIRMED and what in result.because


def built(family: str, **config: Any) -> Any:
    case = next(case for case in CASES if case.family == family)
    model = build(case)
    small = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    rpb.retrofit(model, rpb.RetrofitConfig(**{"init": "normal", **small, **config}))
    return model.eval()


@pytest.mark.parametrize("family", ["bart", "t5", "llama", "bert"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tail", ["flat", "log"])
def test_tables_of_all_stacks_and_their_tails(family: str, shared: bool, tail: str) -> None:
    model = built(family, shared=shared, tail=tail)
    arms = Arms(model)
    assert alterations(arms, 8) == {}
    last = list(arms.biases)[-1]
    changed = arms.biases[last].tail if tail == "log" else arms.biases[last].weight
    assert changed is not None
    with torch.no_grad():
        changed.view(-1)[0] -= 3
    told = alterations(arms, 8) or {}
    assert last in told and set(told.values()) == {UNKNOWN}


def test_mistakes_that_rounding_hides_and_any_two_heads() -> None:
    model = built("llama")
    name, bias = list(Arms(model).biases.items())[1]
    before = bias.weight.data.clone()
    for change, what in (
        (lambda t: t / 96**0.5, "scaled by 1/sqrt(d)"),
        (lambda t: t / 1.5, "made smaller by a third"),
        (lambda t: t[[0, 3, 2, 1]], HEADS),
    ):
        bias.weight.data.copy_(change(before))
        assert alterations(Arms(model), 96) == {name: what}


def test_what_was_trained_elsewhere_is_not_accused(source: PreTrainedModel, fitted: PreTrainedModel) -> None:
    """The last layer and its table, by a loop of the user's own, which writes no checksums."""
    model = copy.deepcopy(fitted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers.1." in name:
                parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    measurements = Measurements(
        Arms(model, source), [language(4096, 9)], None, DiagnosisPlan(lengths=(64,), tokens=2048, probed=1024)
    )
    assert measurements.alterations is None
    for hypothesis in (foreign_tables, weights_differ):
        assert hypothesis.examine(measurements).verdict is not Verdict.CONFIRMED


def test_a_healed_retrofit_keeps_its_provenance(source: PreTrainedModel, fitted: PreTrainedModel) -> None:
    model = copy.deepcopy(fitted)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    record(model)
    name, bias = list(Arms(model).biases.items())[1]
    bias.weight.data.neg_()
    for arms in (Arms(model, source), Arms(model, untrained=fitted)):
        measurements = Measurements(arms, [language(600, 9)], None, DiagnosisPlan(lengths=(64,), tokens=512))
        assert measurements.alterations == {name: "negated"}


def test_zeros_that_were_trained_and_lost(source: PreTrainedModel) -> None:
    model = copy.deepcopy(source)
    rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    measurements = Measurements(Arms(model), [language(600, 9)], None, DiagnosisPlan(lengths=(64,), tokens=512))
    assert tables_not_loaded.examine(measurements).verdict is Verdict.EXCLUDED
    for bias in Arms(model).biases.values():
        bias.weight.data += torch.arange(32)
    record(model)
    for bias in Arms(model).biases.values():
        bias.weight.data.zero_()
    measurements = Measurements(Arms(model), [language(600, 9)], None, DiagnosisPlan(lengths=(64,), tokens=512))
    assert tables_not_loaded.examine(measurements).verdict is Verdict.CONFIRMED


def test_undoing_in_other_layers_is_another_measurement() -> None:
    names = [["a.0", "a.1"], ["a.0", "a.2"], ["a.0"]]
    assert len({of_all("scaled by 1/sqrt(d)", each) for each in names}) == 3
    assert re.fullmatch("[a-z0-9-]+", of_all("scaled by 1/sqrt(d)", names[0]))


def test_a_cast_rounds_buffers_and_is_no_fault() -> None:
    """Rotary frequencies that were cast with the model differ from those that a new model computes."""
    model = built("llama", keep_frequencies=2).to(torch.bfloat16)
    measurements = Measurements(
        Arms(model), [torch.randint(3, 61, (400,))], None, DiagnosisPlan(lengths=(24, 40), tokens=400)
    )
    assert measurements.rebuilt.module is None, measurements.rebuilt


def test_what_overflows_in_half_precision_alone(source: PreTrainedModel) -> None:
    """In float32 it is well: the logits of float16 itself are looked at, too."""
    before = copy.deepcopy(source).half()
    model = copy.deepcopy(before)
    rpb.retrofit(model, rpb.RetrofitConfig(init="normal"))
    arms = Arms(model, before)
    documents = [language(600, 9)]
    plan = DiagnosisPlan(lengths=(64,), tokens=512)
    assert not_finite.examine(Measurements(arms, documents, None, plan)).verdict is Verdict.EXCLUDED
    next(iter(arms.attentions.values())).register_forward_hook(lambda m, args, out: (out[0] * 1e6 / 1e6, *out[1:]))
    result = not_finite.examine(Measurements(arms, documents, None, plan))
    assert result.verdict is Verdict.CONFIRMED and "left padding" in result.because
