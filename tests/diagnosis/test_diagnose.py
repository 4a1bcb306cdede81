"""Diagnosis against the truth: planted faults are named first, healthy retrofits are left in peace."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis import shared_evidence
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.factorial import SCALE, factorial
from rpb_retrofit.diagnosis.finding import CauseKind, Verdict
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES, foreign_tables
from rpb_retrofit.diagnosis.measurements import DiagnosisPlan, Measurements
from rpb_retrofit.diagnosis.run import Diagnosis, diagnose
from rpb_retrofit.errors import DataError, NotRetrofittedError
from rpb_retrofit.evaluation.context_use import induction_gain, make_inductions
from rpb_retrofit.evaluation.losses import difference, token_by_token
from rpb_retrofit.runtime.modeling import submodels
from rpb_retrofit.tables.checksums import KEY
from tests.diagnosis.faults import FAULTS, Fault
from tests.diagnosis.small_model import language, retrofitted, trained
from tests.families.cases import CASES
from tests.families.test_contract import build

LENGTHS = (64, 256)


def examine(arms: Arms, lengths: tuple[int, ...] = LENGTHS, text: Any = language, **plan: Any) -> Measurements:
    plan = {"lengths": lengths, "tokens": 8192, "rounds": 0, **plan}
    return Measurements(arms, [text(8192, 4321)], None, DiagnosisPlan(**plan))


def verdicts(found: Diagnosis) -> dict[str, Verdict]:
    return {outcome.name: outcome.finding.verdict for outcome in found.outcomes}


def forget_checksums(model: Any) -> None:
    """As a retrofit of an older version, or one whose tables a training of another kind changed."""
    settings = {key: value for key, value in model.config.rpb_retrofit.items() if key != KEY}
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = settings


def test_the_model_uses_positions(source: PreTrainedModel) -> None:
    gains = [induction_gain(source, item).gain for item in make_inductions([language(4096, 9)], [40], 8, span=20)]
    assert sum(gains) / len(gains) > 1


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_fault_is_named_first(fault: Fault, source: PreTrainedModel, healthy: str) -> None:
    arms = Arms(rpb.load(healthy).eval(), copy.deepcopy(source))
    arms = fault.plant(arms) or arms
    found = diagnose(examine(arms, fault.lengths, fault.text), figures=False)
    assert [cause.name for cause in found.causes][:1] == [fault.cause], found.headline
    assert found.causes[0].finding.remedy


SLIGHT = ("one layer", "one head's row")
"""In the names of faults that may cost too little to be a cause, where no checksum proves that something changed."""

IN_TABLES = ("wrong_scale", "wrong_order", "off_by_one", "foreign_tables", "tables_not_loaded")


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.cause in IN_TABLES and not any(slight in f.name for slight in SLIGHT)], ids=str
)
def test_planted_fault_is_named_without_checksums(fault: Fault, source: PreTrainedModel, healthy: str) -> None:
    """By the source's attention alone, and by what undoing it brings."""
    arms = Arms(rpb.load(healthy).eval(), copy.deepcopy(source))
    forget_checksums(arms.retrofit)
    arms = fault.plant(arms) or arms
    deep = [h for h in HYPOTHESES if h.kind in (CauseKind.RUNNING, CauseKind.NUMBERS)]
    found = diagnose(examine(arms, fault.lengths, fault.text), hypotheses=deep, figures=False)
    assert [cause.name for cause in found.causes][:1] == [fault.cause], found.headline


def test_every_hypothesis_has_its_fault() -> None:
    symptoms = {"attention_spreads", "other_temperature"}  # of other faults: see test_symptoms
    assert {fault.cause for fault in FAULTS} | symptoms == {h.name for h in HYPOTHESES} - {"does_not_run"}


HEALTHY: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 0, {}),
    ("llama", 0, {"seed": 31}),
    ("llama", 0, {"keep": 4}),
    ("llama", 0, {"scale": "unscaled"}),
    ("llama", 0, {"tail": "log", "max_distance": 64}),
    ("llama", 1, {}),
    ("qwen2", 0, {}),
    ("qwen2", 1, {"keep": 4}),
    ("gpt_neox", 0, {}),
    ("gpt_neox", 1, {"seed": 31}),
    ("gpt2", 0, {}),
    ("gpt2", 1, {}),
]


@pytest.mark.parametrize(("family", "seed", "settings"), HEALTHY, ids=str)
def test_healthy_retrofits_are_left_in_peace(family: str, seed: int, settings: dict[str, Any]) -> None:
    model = trained("llama") if (family, seed) == ("llama", 0) else trained(family, seed, first=0, then=60)
    found = diagnose(examine(Arms(retrofitted(model, **settings), model)), figures=False)
    assert not found.causes, found.headline
    assert not [outcome for outcome in found.outcomes if outcome.finding.failed]
    assert "No cause" in found.headline


def test_a_row_is_spoiled_where_what_it_hands_on_is_farther_too(source: PreTrainedModel) -> None:
    """Fitted tables give up some of the attention for the outputs: far in attention alone is no fault."""
    measurements = examine(Arms(retrofitted(source), source))
    found = measurements.fidelity
    assert found is not None and set(found.missed) == set(found.own)
    assert found.mean(found.missed) < found.mean(found.missed_without)
    assert found.mean(found.missed) < found.mean(found.missed_by_attention)
    name, head = next(iter(found.own)), 2
    far = {**found.own, name: found.own[name].clone()}
    far[name][head] = found.zeros[name][head] + 1
    assert foreign_tables._spoiled_rows(measurements, replace(found, own=far)) == ""
    none = {**found.missed, name: found.missed[name].clone()}
    none[name][head] = found.missed_without[name][head] + 0.1
    assert foreign_tables._spoiled_rows(measurements, replace(found, own=far, missed=none)).endswith(f": {head}")
    assert foreign_tables._spoiled_rows(measurements, replace(found, missed=none)) == ""


SORTS: dict[str, dict[str, Any]] = {
    "kept": {"keep_frequencies": 2},
    "all kept by auto": {"keep_frequencies": "auto"},
    "log tail": {"tail": "log"},
    "unscaled": {"scale": "unscaled"},
    "shared": {"shared": True},
    "alibi": {"init": "alibi"},
    "zeros": {"init": "zeros"},
    "content": {"init": "calibrated", "calibrate": "tables+content"},
    "kept, unscaled, log tail": {"keep_frequencies": 2, "scale": "unscaled", "tail": "log"},
}
"""Every sort of retrofit that changes what a model holds or how it runs."""


@pytest.mark.parametrize("sort", SORTS)
def test_every_crossing_and_twin_runs_on_every_sort(sort: str) -> None:
    """A change of the running model, and a model built anew, meet whatever a retrofit put in."""
    case = next(case for case in CASES if case.family == "llama")
    model, source = build(case), build(case)
    config = rpb.RetrofitConfig(
        **{"init": "normal", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, **SORTS[sort]}
    )
    documents = [torch.randint(3, 61, (400,), generator=torch.Generator().manual_seed(0))]
    rpb.retrofit(model, config, calibration=documents * 2 if config.takes_text else None)
    measurements = Measurements(
        Arms(model, source), documents, None, DiagnosisPlan(lengths=(24, 40), tokens=400, probed=80, rounds=0)
    )
    ids = documents[0][None, :40]
    with torch.no_grad():
        before = model(ids).logits
    crossings = {crossing.name: crossing for crossing in factorial(measurements)}
    assert crossings.keys() >= {"length factor", "attention window", "RoPE scaling"}
    assert all(math.isfinite(cell) for crossing in crossings.values() for cell in crossing.cells)
    cells = crossings["RoPE scaling"].cells
    rotates = bool(config.keep_frequencies)
    assert (cells[2] != cells[3]) or not rotates, "kept frequencies are scaled with the rest"
    found = measurements.rebuilt
    assert found is not None and found.module is None, found
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "every change was undone"


@pytest.mark.parametrize("init", ["alibi", "zeros"])
def test_what_the_settings_say_is_no_fault(init: str, source: PreTrainedModel) -> None:
    """Tables that began alike in all layers, of a retrofit that was never fitted: it is far from its source, and runs
    as it should."""
    model = copy.deepcopy(source)
    rpb.retrofit(model, rpb.RetrofitConfig(init=init))
    found = diagnose(examine(Arms(model, source)), figures=False)
    wrong = [cause for cause in found.causes if cause.kind is CauseKind.RUNNING or cause.name == "tables_shared"]
    assert not wrong, found.headline


def test_nearer_in_attention_alone_is_no_mistake(source: PreTrainedModel) -> None:
    """Tables that were fitted to outputs may be nearer to the source's attention when moved by a bucket: it counts only
    where the heads then also hand on more, and where the loss falls."""
    model = retrofitted(source)
    forget_checksums(model)
    measurements = examine(Arms(model, source))
    found = measurements.fidelity
    assert found is not None
    name, meaning = next(iter(found.own)), "shifted by minus one bucket"
    near = {**found.meant[name], meaning: found.refit[name].clone()}
    far = {**found.own, name: found.refit[name] + 1}
    without = {**found.zeros, name: found.refit[name] + 8}
    missed = {"less": found.missed[name] / 2, "more": found.missed[name] * 2}
    for handed_on, missed_then in missed.items():
        measurements.fidelity = replace(
            found,
            own=far,
            zeros=without,
            meant={**found.meant, name: near},
            missed_if_meant={**found.missed_if_meant, name: {meaning: missed_then}},
        )
        assert shared_evidence._hands_on_more(measurements.fidelity, name, meaning) == (handed_on == "less")
        assert shared_evidence.meant_otherwise(measurements, meaning, "") is None, "moving them does not lower the loss"


CAUSAL = [case for case in CASES if case.kind == "causal" and case.name != "llama-dynamic"]


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_every_family_runs_as_it_should(case: Any) -> None:
    """Of random weights and tables only what runs, and what was written, can be judged: nothing of it is confirmed."""
    model = build(case)
    rpb.retrofit(
        model,
        rpb.RetrofitConfig(init="normal", relative_attention_num_buckets=8, relative_attention_max_distance=16),
    )
    documents = [torch.randint(3, 61, (400,), generator=torch.Generator().manual_seed(0))]
    measurements = Measurements(
        Arms(model, build(case)), documents, None, DiagnosisPlan(lengths=(24, 40), tokens=400, probed=80, rounds=0)
    )
    running = [h for h in HYPOTHESES if h.kind <= CauseKind.NUMBERS]
    found = diagnose(measurements, hypotheses=running, figures=False)
    assert not found.causes, found.headline
    assert not [o.finding.because for o in found.outcomes if o.finding.failed]
    excluded = [name for name, verdict in verdicts(found).items() if verdict is Verdict.EXCLUDED]
    assert len(excluded) >= len(running) - 2


def test_without_the_source_it_cannot_tell(source: PreTrainedModel) -> None:
    model = retrofitted(source)
    for bias in Arms(model).biases.values():
        bias.weight.data.copy_(bias.weight.data.roll(1, 0))
    found = diagnose(examine(Arms(model)), figures=False)
    assert verdicts(found)["wrong_order"] is Verdict.CONFIRMED, "the checksums of what was written tell"
    forget_checksums(model)
    found = diagnose(examine(Arms(model)), figures=False)
    assert verdicts(found)["wrong_order"] is Verdict.UNKNOWN
    assert "source" in found.missing and not found.causes


def test_symptoms(source: PreTrainedModel) -> None:
    """A flat temperature spreads attention: both are seen, and what undoing them brings back."""
    model = retrofitted(source)
    for bias in Arms(model).biases.values():
        bias.weight.data *= 0.8
    for attention in Arms(model).attentions.values():
        attention.q_proj.weight.data *= 0.1
    found = diagnose(examine(Arms(model), probed=4096), figures=False)
    assert "other_temperature" in [cause.name for cause in found.causes]
    assert (found.causes[-1].finding.gain or 0) > 0


@pytest.mark.parametrize("factor", [4.0, 0.5])
def test_factorial_recovers_planted_effects(source: PreTrainedModel, factor: float) -> None:
    """The truth, on text that the factorial does not read, lies in its intervals."""

    def planted(scale: float, flat: bool) -> PreTrainedModel:
        model = retrofitted(source)
        for attention in Arms(model).attentions.values():
            attention.scaling *= scale
            if flat:
                attention.relative_attention_bias.weight.data[:, 12:] = 0
        return model

    measurements = examine(Arms(planted(factor, True), source), probed=4096)
    found = {crossing.name: crossing for crossing in factorial(measurements)}[SCALE]
    assert found.gap.mean == pytest.approx(found.method.mean + found.factor.mean + found.both.mean, abs=1e-9)

    fresh = [language(30_000, 777_000)]
    scaled = copy.deepcopy(source)
    for attention in (layer.self_attn for layer in scaled.model.layers):  # type: ignore[union-attr]
        attention.scaling *= factor
    losses = {
        name: token_by_token(model, fresh, measurements.text.middle, 30_000, None)
        for name, model in {
            "plain": source,
            "scaled": scaled,
            "tables": planted(1.0, True),
            "both": planted(factor, True),
        }.items()
    }
    for effect, truth in (
        (found.method, difference(losses["plain"], losses["tables"]).mean),
        (found.factor, difference(losses["plain"], losses["scaled"]).mean),
        (found.gap, difference(losses["plain"], losses["both"]).mean),
    ):
        slack = 0.5 * (effect.high - effect.low)  # the truth was measured on text, too
        assert effect.low - slack <= truth <= effect.high + slack
        assert effect.real


def test_figures_of_all_arms(source: PreTrainedModel, healthy: str) -> None:
    retrofit = rpb.load(healthy).eval()
    arms = Arms(retrofit, source, untrained=retrofit, control=source)
    found = diagnose(examine(arms, rounds=1)).to_dict()
    figures = found["figures"]
    assert set(figures["loss"]["mean"]) == {"source", "control", "untrained", "retrofit"}
    costs = {(c["arm"], c["above"], c["length"]): c for c in figures["loss"]["costs"]}
    assert costs["control", "source", 256]["mean"] == 0 and not costs["control", "source", 256]["real"]
    assert costs["retrofit", "source", 256]["mean"] > 0
    assert sum(figures["coverage"]["share"]) == pytest.approx(1)
    assert {row["arm"] for row in figures["speed"]} == {"source", "retrofit"}
    lines = figures["bias"]
    assert len(lines["offsets"]) == len(lines["retrofit"]["model.layers.0.self_attn"][0])


def test_lengths_that_do_not_fit_are_named(source: PreTrainedModel) -> None:
    gpt2 = trained("gpt2", 0, first=0, then=60)
    measurements = examine(Arms(retrofitted(gpt2), gpt2), lengths=(64, 512, 9000))
    found = diagnose(measurements)
    assert "9000" in " ".join(found.skipped) and any("source-512" in name for name in found.skipped)
    means = found.figures["loss"]["mean"]
    assert set(means["source"]) == {"64"} and set(means["retrofit"]) == {"64", "512"}


def test_no_memory_for_a_length(source: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = retrofitted(source)
    forward = type(model).forward

    def limited(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids is not None and input_ids.shape[1] >= 256:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    measurements = examine(Arms(model, source), lengths=(64, 256))
    assert measurements.losses("retrofit", 256) is None and measurements.losses("retrofit", 64) is not None
    assert "can't allocate" in measurements.skipped["loss-retrofit-256"]


def test_wrong_arms(source: PreTrainedModel) -> None:
    retrofit = retrofitted(source)
    with pytest.raises(NotRetrofittedError, match=r"the retrofit '.*' is no retrofit"):
        Arms(source, source)
    with pytest.raises(NotRetrofittedError, match=r"the source '.*' is a retrofit: give the plain model"):
        Arms(retrofit, retrofit)
    other = copy.deepcopy(source)
    other.config.vocab_size = 50
    with pytest.raises(DataError, match="has 50 tokens, the retrofit 48"):
        Arms(retrofit, other)
    with pytest.raises(DataError, match="longest document has 30 tokens"):
        diagnose(Measurements(Arms(retrofit, source), [language(30, 1)], None, DiagnosisPlan(lengths=LENGTHS)))
