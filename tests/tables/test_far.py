"""What a model finds far away: copies over distances inside, at the edge of and beyond the last bucket, and the layers
that they need."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.context_use import induction_gains
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.tables import layer_needs as module
from rpb_retrofit.tables.layer_needs import layer_needs
from tests.diagnosis.small_model import CONTEXT, language, trained
from tests.families.cases import BY_NAME
from tests.support.calibration import CALIBRATED, calibration_windows
from tests.support.tiny_models import CONFIG, build

REACH = 40
"""Offsets from here on share the last bucket."""

DISTANCES = (24, REACH - 1, REACH, REACH + 1, 64, 80)


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return trained("llama", 0)


def windows(count: int = 16) -> list[Tensor]:
    return [language(CONTEXT, 777 + number) for number in range(count)]


def gains(model: PreTrainedModel) -> dict[int, float]:
    measured = induction_gains(model, [language(4096, 9)], dict.fromkeys(DISTANCES, 16), span=20)
    return {distance: fmean(each) for distance, each in measured.items()}


def kept(source: PreTrainedModel, keep: int | str, **settings: Any) -> PreTrainedModel:
    model = copy.deepcopy(source)
    rpb.retrofit(
        model,
        rpb.RetrofitConfig(
            relative_attention_num_buckets=16, relative_attention_max_distance=REACH, keep_frequencies=keep, **settings
        ),
        calibration=windows(),
    )
    return model


@pytest.mark.parametrize("settings", [{}, {"calibrate": "tables+content"}], ids=["tables", "tables+content"])
def test_what_is_far_stays_found(source: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Planted: with the high frequencies kept, at least 0.9 of what copies gain in the source, wherever they lie."""
    before, after = gains(source), gains(kept(source, "auto", **settings))
    assert min(before.values()) > 1, "the source learned to copy"
    shares = {distance: after[distance] / before[distance] for distance in DISTANCES}
    assert min(shares.values()) >= 0.9, shares


def test_the_derivative_is_that_of_mixing(source: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loss with a hundredth of the source's attention mixed in by hand, one layer at a time."""
    model = kept(source, 2)
    anatomy = Anatomy.of(model)
    monkeypatch.setattr(module, "ITEMS", 1)
    needs = layer_needs(anatomy, windows(1))
    ids, at = module._item(windows(1)[0], windows(1)[0].unique().tolist(), 0, 0)
    with torch.no_grad():
        base = float(module._loss(model, ids, at))
        for name in anatomy.attentions:
            with module._with_shares(anatomy, {name: torch.tensor(0.01)}):
                slope = (base - float(module._loss(model, ids, at))) / 0.01
            assert needs[name] == pytest.approx(max(0.0, slope), rel=0.05, abs=2e-3)
    assert max(needs.values()) > 0


@torch.no_grad()
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "llama4_text", "qwen3", "deepseek_v3", "gpt_neox"])
def test_the_whole_share_is_the_source(family: str, factors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retrofit whose attentions are all the source's computes what the source does: layers without positions too."""
    model, plain = build(BY_NAME[family]), build(BY_NAME[family])
    if factors:
        monkeypatch.setattr("rpb_retrofit.swap.inplace.fold", lambda *args: None)
        rpb.retrofit(model, replace(CALIBRATED, calibrate="tables+content"), calibration_windows())
    else:
        rpb.retrofit(model, replace(CONFIG, init="normal"))
    anatomy = Anatomy.of(model)
    ids = calibration_windows()[0].flatten()[None, :24]
    with module._with_shares(anatomy, dict.fromkeys(anatomy.attentions, torch.tensor(1.0))):
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(whole, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)


def test_layers_are_chosen_by_it(source: PreTrainedModel) -> None:
    """The layer that needs it most keeps all; the report says which, the config keeps it, and revert is exact."""
    model, ids = copy.deepcopy(source), windows(1)[0][None]
    report = rpb.retrofit(model, rpb.RetrofitConfig(keep_frequencies="2+1"), calibration=windows())
    has = Anatomy.of(model).rotary_counts["inv_freq"]
    in_layers = model.config.rpb_retrofit["kept_in_layers"]
    assert sorted(in_layers) == [2, has]
    note = next(note for note in report.notes if note.startswith("all frequencies kept in the layers "))
    chosen, most, other = re.findall(r"layers (\d) \((\d+\.\d\d)\).*another layer is (\d+\.\d\d)", note)[0]
    assert in_layers[int(chosen)] == has and float(most) > float(other), note
    rpb.revert(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, source(ids).logits)


@pytest.mark.parametrize(
    ("family", "config", "answer"),
    [
        ("llama", replace(CONFIG, keep_frequencies=0), None),
        ("llama", replace(CALIBRATED, keep_frequencies="1+3"), "2 layers do not keep all already; choose fewer"),
        ("modernbert", replace(CALIBRATED, keep_frequencies="1+1"), "predicts no next token, so name the layers"),
    ],
)
def test_wrong_input(family: str, config: rpb.RetrofitConfig, answer: str | None) -> None:
    model = build(BY_NAME[family])
    if answer is None:
        with pytest.raises(ConfigError, match="needs init='calibrated', which has text to choose layers by"):
            replace(config, keep_frequencies="auto+1")
        return
    with pytest.raises(ConfigError, match=answer):
        rpb.retrofit(model, config, calibration=calibration_windows())
    assert not hasattr(model.config, "rpb_retrofit")
