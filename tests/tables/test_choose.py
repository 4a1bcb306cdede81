"""Buckets chosen by held-out text, and heads matched by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.tables.bucket_search import BUCKETS, Trial, held_out_divergence, sizes
from rpb_retrofit.tables.fit import fit
from rpb_retrofit.tables.parameters import ParameterLayout
from tests.families.cases import BY_NAME
from tests.support.calibration import CALIBRATED, calibration_windows
from tests.support.planted import Planted
from tests.support.tiny_models import CONFIG, build, inputs_of, tokens

AUTO = replace(CALIBRATED, relative_attention_num_buckets="auto")


def test_the_candidates_are_valid() -> None:
    assert sizes(2048, [False])[0] == (16, 64) and (64, 2048) in sizes(2048, [False])
    assert max(reach for _, reach in sizes(2048, [False])) == 2048 == max(reach for _, reach in sizes(600, [False]))
    for count, reach in sizes(100, [False, True]):
        assert count in BUCKETS and reach <= 128
        Bucketing(count, reach, True).validate()
        Bucketing(count, reach, False).validate()


@pytest.mark.parametrize("planted", [(16, 64), (64, 512)])
def test_what_was_planted_is_chosen(planted: tuple[int, int]) -> None:
    """A source whose bias has few, near buckets needs no more; one with many cannot do with fewer."""
    source = Planted(ParameterLayout(Bucketing(*planted, False)), keys=700, step=5, dtype=torch.float32)
    pairs = list(source.pairs(4))
    trial = Trial(["layer"], 700, [False])
    trial("layer", lambda windows: [pairs[w] for w in windows], 4, ParameterLayout(source.bucketing))
    choice = trial.choice()
    assert (choice.chosen.num_buckets, choice.chosen.max_distance) == planted
    assert f"buckets auto: {planted[0]} to {planted[1]}" in str(choice)
    assert choice.candidates == sorted(choice.candidates, key=lambda candidate: candidate.held_out)


def test_more_buckets_than_the_text_bears_are_worse_on_held_out_text() -> None:
    """Overfitting shows: fitted to a handful of rows, 128 buckets lose against 16 on rows that they did not see."""
    torch.manual_seed(0)
    source = Planted(ParameterLayout(Bucketing(16, 64, False)), keys=300, step=90, dtype=torch.float32)
    noisy = [(replace(s, scores=s.scores + torch.randn_like(s.scores)), o) for s, o in source.pairs(8)]
    few, many = (
        held_out_divergence(noisy[:2], noisy[2:], ParameterLayout(Bucketing(count, reach, False)))
        for count, reach in ((16, 64), (128, 256))
    )
    assert few < many


def test_in_a_model(tmp_path: Path) -> None:
    model, plain = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    report = rpb.retrofit(model, AUTO, calibration_windows(windows=4))
    count, reach = report.num_buckets, report.max_distance
    assert (count, reach) in sizes(48, [False]) and f"buckets auto: {count} to {reach}" in str(report)
    assert model.config.rpb_retrofit["relative_attention_num_buckets"] == count
    by_hand = build(BY_NAME["llama"])
    chosen = {"relative_attention_num_buckets": count, "relative_attention_max_distance": reach}
    rpb.retrofit(by_hand, replace(CALIBRATED, **chosen), calibration_windows(windows=4))
    for name in report.tables:
        assert torch.equal(model.get_parameter(name), by_hand.get_parameter(name)), "as if asked for"
    model.save_pretrained(tmp_path)
    assert torch.equal(rpb.load(tmp_path)(tokens()).logits, model(tokens()).logits)
    rpb.revert(model)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


def test_it_needs_text_to_hold_out() -> None:
    with pytest.raises(ConfigError, match="relative_attention_num_buckets='auto' needs init='calibrated'"):
        rpb.RetrofitConfig(relative_attention_num_buckets="auto", init="zeros")
    model, plain = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    with pytest.raises(DataError, match="one window of text; choosing buckets holds one out"):
        rpb.retrofit(model, AUTO, calibration_windows(windows=1))
    assert type(model) is type(plain) and torch.equal(model(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_are_matched_by_text(name: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables whose heads were shuffled: with text each head finds its own again, without it none does.

    They are those nearest in attention, which is what is matched.
    """
    monkeypatch.setattr("rpb_retrofit.tables.calibrate.fit_outputs", lambda pairs, layout, metric: fit(pairs, layout))
    case = BY_NAME[name]
    model = build(case)
    config = replace(CALIBRATED, shared=shared)
    rpb.retrofit(model, config, calibration_windows())
    order = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    fitted = {n: p.detach().clone() for n, p in model.named_parameters() if f"{TABLE}." in n}
    for parameter in (model.get_parameter(n) for n in fitted):
        parameter.data.copy_(parameter[order])
    model.save_pretrained(tmp_path)
    again = build(case)
    report = rpb.retrofit(again, replace(config, init=f"from:{tmp_path}"), calibration_windows())
    assert "heads matched on 2 windows" in str(report)
    if not shared:
        assert report.calibration.layers[0].heads == order.argsort().tolist()
        for n, table in fitted.items():
            torch.testing.assert_close(again.get_parameter(n).detach(), table)
        with torch.no_grad():
            assert again(**inputs_of(case, tokens())).logits.isfinite().all()
    assert report.calibration.after < report.calibration.before


def test_text_is_refused_where_it_serves_nothing() -> None:
    with pytest.raises(ConfigError, match="calibration was given, but init='zeros' uses none"):
        rpb.retrofit(build(BY_NAME["llama"]), CONFIG, calibration_windows())
