"""What a diagnosis measures: of every sort of retrofit, all arms, lengths that do not fit, effects that are known."""

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
from rpb_retrofit.diagnosis.hypotheses import foreign_tables
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.run import run_diagnosis
from rpb_retrofit.errors import DataError, NotRetrofittedError
from rpb_retrofit.evaluation.context_use import induction_gains
from rpb_retrofit.evaluation.losses import difference, token_by_token
from tests.diagnosis.examined import LENGTHS, forget_checksums, measurements_of
from tests.diagnosis.small_model import language, retrofitted, trained
from tests.families.cases import CASES
from tests.support.tiny_models import build


def test_the_model_uses_positions(source: PreTrainedModel) -> None:
    gains = induction_gains(source, [language(4096, 9)], {40: 8}, span=20)[40]
    assert sum(gains) / len(gains) > 1


def test_a_row_is_spoiled_where_what_it_hands_on_is_farther_too(source: PreTrainedModel) -> None:
    """Fitted tables give up some of the attention for the outputs: far in attention alone is no fault."""
    measurements = measurements_of(Arms(retrofitted(source), source))
    result = measurements.fidelity
    assert result is not None and set(result.missed) == set(result.own)
    assert result.mean(result.missed) < result.mean(result.missed_without)
    assert result.mean(result.missed) < result.mean(result.missed_by_attention)
    name, head = next(iter(result.own)), 2
    far = {**result.own, name: result.own[name].clone()}
    far[name][head] = result.zeros[name][head] + 1
    assert foreign_tables._spoiled_rows(measurements, replace(result, own=far)) == ""
    none = {**result.missed, name: result.missed[name].clone()}
    none[name][head] = result.missed_without[name][head] + 0.1
    assert foreign_tables._spoiled_rows(measurements, replace(result, own=far, missed=none)).endswith(f": {head}")
    assert foreign_tables._spoiled_rows(measurements, replace(result, missed=none)) == ""


SORTS: dict[str, dict[str, Any]] = {
    "kept": {"keep_frequencies": 2},
    "kept by layers": {"keep_frequencies": "1,1:all"},
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
    result = measurements.rebuilt
    assert result is not None and result.module is None, result
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "every change was undone"


def test_nearer_in_attention_alone_is_no_mistake(source: PreTrainedModel) -> None:
    """Tables that were fitted to outputs may be nearer to the source's attention when moved by a bucket: it counts only
    where the heads then also hand on more, and where the loss falls."""
    model = retrofitted(source)
    forget_checksums(model)
    measurements = measurements_of(Arms(model, source))
    result = measurements.fidelity
    assert result is not None
    name, meaning = next(iter(result.own)), "shifted by minus one bucket"
    near = {**result.meant[name], meaning: result.refit[name].clone()}
    far = {**result.own, name: result.refit[name] + 1}
    without = {**result.zeros, name: result.refit[name] + 8}
    missed = {"less": result.missed[name] / 2, "more": result.missed[name] * 2}
    for handed_on, missed_then in missed.items():
        measurements.fidelity = replace(
            result,
            own=far,
            zeros=without,
            meant={**result.meant, name: near},
            missed_if_meant={**result.missed_if_meant, name: {meaning: missed_then}},
        )
        assert shared_evidence._hands_on_more(measurements.fidelity, name, meaning) == (handed_on == "less")
        assert shared_evidence.meant_otherwise(measurements, meaning, "") is None, "moving them does not lower the loss"


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

    measurements = measurements_of(Arms(planted(factor, True), source), probed=4096)
    crossed = {crossing.name: crossing for crossing in factorial(measurements)}[SCALE]
    assert crossed.gap.mean == pytest.approx(crossed.method.mean + crossed.factor.mean + crossed.both.mean, abs=1e-9)

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
        (crossed.method, difference(losses["plain"], losses["tables"]).mean),
        (crossed.factor, difference(losses["plain"], losses["scaled"]).mean),
        (crossed.gap, difference(losses["plain"], losses["both"]).mean),
    ):
        slack = 0.5 * (effect.high - effect.low)  # the truth was measured on text, too
        assert effect.low - slack <= truth <= effect.high + slack
        assert effect.real


def test_figures_of_all_arms(source: PreTrainedModel, healthy: str) -> None:
    retrofit = rpb.load(healthy).eval()
    arms = Arms(retrofit, source, untrained=retrofit, control=source)
    result = run_diagnosis(measurements_of(arms, rounds=1)).to_dict()
    figures = result["figures"]
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
    measurements = measurements_of(Arms(retrofitted(gpt2), gpt2), lengths=(64, 512, 9000))
    result = run_diagnosis(measurements)
    assert "9000" in " ".join(result.skipped) and any("source-512" in name for name in result.skipped)
    means = result.figures["loss"]["mean"]
    assert set(means["source"]) == {"64"} and set(means["retrofit"]) == {"64", "512"}


def test_no_memory_for_a_length(source: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = retrofitted(source)
    forward = type(model).forward

    def limited(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids is not None and input_ids.shape[1] >= 256:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    measurements = measurements_of(Arms(model, source), lengths=(64, 256))
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
        run_diagnosis(Measurements(Arms(retrofit, source), [language(30, 1)], None, DiagnosisPlan(lengths=LENGTHS)))
