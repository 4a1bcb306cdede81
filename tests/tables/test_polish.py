"""End-to-end polish: only tables move, towards the source's predictions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError, DataError
from tests.families.cases import BY_NAME
from tests.support.tiny_models import CONFIG, build, tokens

POLISHED = replace(CONFIG, init="calibrated", polish=40)


def text() -> list[torch.Tensor]:
    return [tokens(30, 40, seed=5)]


@torch.no_grad()
def divergence(name: str, model: Any) -> float:
    """KL of the source's next-token distribution to the model's, whole vocabulary, on text that nobody trained on."""
    log_p, log_q = (m(tokens(8, 24, seed=6)).logits.double().log_softmax(-1) for m in (build(BY_NAME[name]), model))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", ["llama", "mpt", "falcon-rope"])
def test_it_brings_the_predictions_nearer_and_leaves_the_weights(name: str) -> None:
    model, fitted = build(BY_NAME[name]), build(BY_NAME[name])
    rpb.retrofit(fitted, replace(POLISHED, init="zeros", polish=0))
    model.get_input_embeddings().weight.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    report = rpb.retrofit(model, replace(POLISHED, init="zeros"), polishing=text())
    assert report.polish.kept and report.polish.after < report.polish.before
    assert divergence(name, model) < divergence(name, fitted)
    assert re.search(r"polished in 40 steps, 1,600 tokens: .* 0?\.?\d", str(report))
    tables = set(report.tables)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == wanted.get(name, True)
        assert torch.equal(parameter, fitted.get_parameter(name)) == (name not in tables), name
    rpb.revert(model)


def test_it_repeats() -> None:
    tables = []
    for _ in range(2):
        model = build(BY_NAME["llama"])
        report = rpb.retrofit(model, POLISHED, calibration=text())
        tables.append(torch.stack([model.get_parameter(name).detach() for name in report.tables]))
    assert torch.equal(*tables)


def test_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that wrecks the tables: the held-out text tells, and they are as the fit left them."""
    monkeypatch.setattr("rpb_retrofit.tables.polish.RATE", 1e4)
    model, fitted = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    rpb.retrofit(fitted, replace(POLISHED, polish=0), calibration=text())
    report = rpb.retrofit(model, POLISHED, calibration=text())
    assert not report.polish.kept and "no better" in str(report)
    for name in report.tables:
        assert torch.equal(model.get_parameter(name), fitted.get_parameter(name))


@pytest.mark.parametrize(
    ("name", "config", "texts", "answer"),
    [
        ("llama", replace(CONFIG, polish=3), {}, "polish=3 needs text"),
        ("llama", CONFIG, {"polishing": text()}, "polishing was given, but polish=0"),
        ("llama", replace(CONFIG, polish=3), {"polishing": [tokens(1, 40)]}, "polish=3: a single piece of text"),
        (
            "bart",
            replace(CONFIG, polish=3),
            {"polishing": text()},
            "polish=3: BartForConditional",
        ),
    ],
)
def test_wrong_input(name: str, config: rpb.RetrofitConfig, texts: dict[str, Any], answer: str) -> None:
    model = build(BY_NAME[name])
    with pytest.raises((ConfigError, DataError), match=re.escape(answer)):
        rpb.retrofit(model, config, **texts)
    assert not hasattr(model.config, "rpb_retrofit")


def test_negative_steps() -> None:
    with pytest.raises(ConfigError, match=r"polish=-1: a number of steps"):
        replace(CONFIG, polish=-1)
