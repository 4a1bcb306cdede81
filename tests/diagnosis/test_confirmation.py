"""What a diagnosis rests on: exact provenance of tables, float32 for half precision, and what undoing brings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis import exactly
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.effect import LIKELIEST, Effect, predictions, scores
from rpb_retrofit.diagnosis.exactly import in_float32
from rpb_retrofit.diagnosis.exam import Exam, Plan
from rpb_retrofit.diagnosis.finding import Verdict
from rpb_retrofit.diagnosis.hypotheses import not_finite
from rpb_retrofit.diagnosis.intervention import attending_as
from rpb_retrofit.diagnosis.provenance import HEADS, LAYERS, UNKNOWN, alterations
from rpb_retrofit.diagnosis.weights import trained_kinds
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables.checksums import KEY, checksums
from tests.diagnosis.small_model import language, retrofitted


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
    assert (checksums(table, buckets) == checksums(other, buckets)) == torch.equal(table, other)


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
    monkeypatch.setattr(exactly, "SHARE", 0.0)
    with in_float32(model) as dtype:
        assert dtype == torch.bfloat16 and next(model.parameters()).dtype == torch.bfloat16


def test_distance_is_the_divergence_of_predictions(source: PreTrainedModel, fitted: PreTrainedModel) -> None:
    documents = [language(600, 9)]
    assert source.config.vocab_size <= LIKELIEST, "so it is exact"
    losses, theirs = predictions(source, documents, 64, 256, None)
    own = scores(fitted, documents, 64, 256, None, theirs)
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
    assert same.share == 0 and not same.sure and not same.harmful


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
        with attending_as(arms, source, {name: torch.ones(4, dtype=torch.bool)}):
            model(ids)
            assert torch.allclose(seen["retrofit"], want, atol=1e-4)
        assert torch.equal(model(ids).logits, plain), "afterwards as before"


def test_training_moves_a_kind_of_weights_damage_does_not() -> None:
    names = [f"model.layers.{n}.{kind}.weight" for n in range(4) for kind in ("q_proj", "k_proj")]
    adapters = {name: 0.01 * name.count("q_proj") for name in names}
    assert trained_kinds(adapters) == {"model.layers.*.q_proj.weight"}
    assert trained_kinds({**dict.fromkeys(names, 0.0), names[2]: 0.5}) == set()


def test_what_overflows_in_half_precision_alone(source: PreTrainedModel) -> None:
    """In float32 it is well: the logits of float16 itself are looked at, too."""
    before = copy.deepcopy(source).half()
    model = copy.deepcopy(before)
    rpb.retrofit(model, rpb.RetrofitConfig(init="normal"))
    arms = Arms(model, before)
    documents = [language(600, 9)]
    plan = Plan(lengths=(64,), tokens=512)
    assert not_finite.examine(Exam(arms, documents, None, plan)).verdict is Verdict.EXCLUDED
    next(iter(arms.attentions.values())).register_forward_hook(lambda m, args, out: (out[0] * 1e6 / 1e6, *out[1:]))
    found = not_finite.examine(Exam(arms, documents, None, plan))
    assert found.verdict is Verdict.CONFIRMED and "left padding" in found.because
