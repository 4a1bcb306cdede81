"""Diagnosis against the truth: planted faults are named first, healthy retrofits are left in peace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.finding import CauseKind, Verdict
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.run import run_diagnosis
from tests.diagnosis.examined import HEALTHY, forget_checksums, measurements_of, verdicts
from tests.diagnosis.faults import FAULTS, Fault
from tests.diagnosis.small_model import CONTEXT, language, retrofitted, trained
from tests.families.cases import CASES
from tests.support.tiny_models import build


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_fault_is_named_first(fault: Fault, source: PreTrainedModel, healthy: str) -> None:
    arms = Arms(rpb.load(healthy).eval(), copy.deepcopy(source))
    arms = fault.plant(arms) or arms
    diagnosis = run_diagnosis(measurements_of(arms, fault.lengths, fault.text), figures=False)
    assert [cause.name for cause in diagnosis.causes][:1] == [fault.cause], diagnosis.headline
    assert diagnosis.causes[0].finding.remedy


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
    diagnosis = run_diagnosis(measurements_of(arms, fault.lengths, fault.text), hypotheses=deep, figures=False)
    assert [cause.name for cause in diagnosis.causes][:1] == [fault.cause], diagnosis.headline


def test_every_hypothesis_has_its_fault() -> None:
    symptoms = {"attention_spreads", "other_temperature"}  # of other faults: see test_symptoms
    assert {fault.cause for fault in FAULTS} | symptoms == {h.name for h in HYPOTHESES} - {"does_not_run"}


@pytest.mark.parametrize(("family", "seed", "settings"), HEALTHY, ids=str)
def test_healthy_retrofits_are_left_in_peace(family: str, seed: int, settings: dict[str, Any]) -> None:
    model = trained("llama") if (family, seed) == ("llama", 0) else trained(family, seed, first=0, then=60)
    diagnosis = run_diagnosis(measurements_of(Arms(retrofitted(model, **settings), model)), figures=False)
    assert not diagnosis.causes, diagnosis.headline
    assert not [outcome for outcome in diagnosis.outcomes if outcome.finding.failed]
    assert "No cause" in diagnosis.headline


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A T5 checkpoint with random tables, which its layers share."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=8, num_heads=4, num_layers=2))
    model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.normal_()
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recorded", [True, False], ids=["with checksums", "without"])
@pytest.mark.parametrize("init", ["alibi", "zeros", "normal", "from:t5", "from:t5, heads matched"])
def test_what_the_settings_say_is_no_fault(init: str, recorded: bool, t5: str, source: PreTrainedModel) -> None:
    """Tables that were never fitted to this source, be they alike in all layers or heads: it is far from its source,
    but runs as it should, and its numbers are as meant."""
    model, config = copy.deepcopy(source), rpb.RetrofitConfig(init=init.partition(",")[0].replace("t5", t5))
    rpb.retrofit(model, config, [language(CONTEXT, 5)] if "matched" in init else None)
    if not recorded:
        forget_checksums(model)
    diagnosis = run_diagnosis(measurements_of(Arms(model, source)), figures=False)
    wrong = [cause for cause in diagnosis.causes if cause.kind <= CauseKind.NUMBERS]
    assert not wrong, diagnosis.headline


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
    diagnosis = run_diagnosis(measurements, hypotheses=running, figures=False)
    assert not diagnosis.causes, diagnosis.headline
    assert not [o.finding.because for o in diagnosis.outcomes if o.finding.failed]
    excluded = [name for name, verdict in verdicts(diagnosis).items() if verdict is Verdict.EXCLUDED]
    assert len(excluded) >= len(running) - 2


def test_without_the_source_it_cannot_tell(source: PreTrainedModel) -> None:
    model = retrofitted(source)
    for bias in Arms(model).biases.values():
        bias.weight.data.copy_(bias.weight.data.roll(1, 0))
    diagnosis = run_diagnosis(measurements_of(Arms(model)), figures=False)
    assert verdicts(diagnosis)["wrong_order"] is Verdict.CONFIRMED, "the checksums of what was written tell"
    forget_checksums(model)
    diagnosis = run_diagnosis(measurements_of(Arms(model)), figures=False)
    assert verdicts(diagnosis)["wrong_order"] is Verdict.UNKNOWN
    assert "source" in diagnosis.missing and not diagnosis.causes


def test_symptoms(source: PreTrainedModel) -> None:
    """A flat temperature spreads attention: both are seen, and what undoing them brings back."""
    model = retrofitted(source)
    for bias in Arms(model).biases.values():
        bias.weight.data *= 0.8
    for attention in Arms(model).attentions.values():
        attention.q_proj.weight.data *= 0.1
    diagnosis = run_diagnosis(measurements_of(Arms(model), probed=4096), figures=False)
    assert "other_temperature" in [cause.name for cause in diagnosis.causes]
    assert (diagnosis.causes[-1].finding.gain or 0) > 0
