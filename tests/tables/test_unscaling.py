"""``scale='unscaled'``: the scores are undivided, the model is what it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import family_of, is_own
from rpb_retrofit.tables import unscaling
from tests.families.cases import BY_NAME, CASES
from tests.support.calibration import calibration_windows
from tests.support.tiny_models import CONFIG, build, inputs_of, tokens

NORMAL = replace(CONFIG, init="normal")
UNSCALED = replace(NORMAL, scale="unscaled")
REFUSED = {
    **dict.fromkeys(
        ("bloom", "mpt", "falcon", "falcon-rope", "modernbert"), "keeps the scale of its attention to itself"
    ),
    "llama4_text": "no weights alone make the queries",  # they are of length one
}


def logits(model: Any, case: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(case, tokens(2, 40))).logits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family(case: Any, tmp_path: Path) -> None:
    """The same logits from scores without a scale; saved and loaded too; revert is exact. Or one line that says why."""
    scaled, model, source = build(case), build(case), build(case)
    rpb.retrofit(scaled, NORMAL)
    if why := REFUSED.get(str(case)):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(rpb.errors.ConfigError, match=rf"scale='unscaled': .*{why}.* scale='source'"):
            rpb.retrofit(model, UNSCALED)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert torch.equal(logits(model, case), logits(source, case))
        return
    report = rpb.retrofit(model, UNSCALED)
    assert model.config.rpb_retrofit["scale"] == "unscaled"
    attentions = Anatomy.of(model).attentions.values()
    assert {attention.scaling for attention in attentions} == {1.0}
    changed = {n for n, p in source.named_parameters() if not is_own(n)
               and not torch.equal(p, model.get_parameter(n))}  # fmt: skip
    assert len(changed) <= 2 * len(attentions) and bool(changed) == (family_of(source.config).mechanism != "t5")
    folded = f"scale of the scores folded into {len(changed)} weights that make queries"
    assert report.notes == [folded if changed else "scores had no scale"]
    want = logits(scaled, case)
    torch.testing.assert_close(logits(model, case), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    model.save_pretrained(tmp_path)
    loaded = rpb.load(tmp_path).eval()
    assert torch.equal(logits(loaded, case), logits(model, case))
    rpb.revert(model)
    assert torch.equal(logits(model, case), logits(source, case))
    assert all(torch.equal(p, source.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_with_factors_and_kept_frequencies(name: str) -> None:
    """Both are folded, or one stays a parameter; revert is exact all the same."""
    settings = {"init": "calibrated", "calibrate": "tables+content", "keep_frequencies": 1}
    case = BY_NAME[name]
    scaled, model, source = build(case), build(case), build(case)
    rpb.retrofit(scaled, replace(CONFIG, **settings), calibration_windows())
    rpb.retrofit(model, replace(CONFIG, scale="unscaled", **settings), calibration_windows())
    torch.testing.assert_close(logits(model, case), logits(scaled, case), rtol=1e-4, atol=1e-4)
    rpb.revert(model)
    assert torch.equal(logits(model, case), logits(source, case))


@pytest.mark.parametrize("init", ["zeros", "normal"])
def test_on_disk(init: str, tmp_path: Path) -> None:
    """Weights that change are written into the shards, others are not touched; what is loaded runs undivided."""
    case = BY_NAME["llama"]
    build(case).save_pretrained(tmp_path / "plain")
    for scale in ("source", "unscaled"):
        retrofit_checkpoint(str(tmp_path / "plain"), tmp_path / scale, replace(CONFIG, init=init, scale=scale))
    scaled, model = (rpb.load(tmp_path / scale).eval() for scale in ("source", "unscaled"))
    torch.testing.assert_close(logits(model, case), logits(scaled, case), rtol=1e-4, atol=1e-4)
    changed = {n for n, p in scaled.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed and all("q_proj" in name for name in changed)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("noise", [1.0, 0.03, 1e-4])
def test_first_tokens_that_are_alike(name: str, noise: float) -> None:
    """In real models what stands first is nearly the same whatever it is; widths whose scale is no power of two."""
    case = replace(BY_NAME[name], settings={**BY_NAME[name].settings, "hidden_size": 1024, "head_dim": 24})
    scaled, model = build(case), build(case)
    for one in (scaled, model):
        table = one.get_input_embeddings().weight.data
        table.copy_(table[:1] + noise * table)
    rpb.retrofit(scaled, NORMAL)
    rpb.retrofit(model, UNSCALED)
    want = logits(scaled, case)
    assert (logits(model, case) - want).norm() < 1e-4 * want.norm()
    changed = {n for n, p in scaled.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert all(("q_norm" if name == "qwen3" else "q_proj") in each for each in changed)


def test_an_error_in_the_middle_leaves_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    case, fold, done = BY_NAME["llama"], unscaling._fold, []
    model, source = build(case), build(case)

    def fail(*arguments: Any) -> None:
        if done:
            raise torch.OutOfMemoryError("no more")
        done.append(fold(*arguments))

    monkeypatch.setattr(unscaling, "_fold", fail)
    model.train()
    model.model.layers[0].mlp.eval()
    with pytest.raises(torch.OutOfMemoryError):
        rpb.retrofit(model, UNSCALED)
    assert model.training and not model.model.layers[0].mlp.training
    assert torch.equal(logits(model.eval(), case), logits(source, case))


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = build(BY_NAME["llama"])
    with pytest.raises(rpb.errors.UnsupportedModelError, match="is on the meta device, without a value"):
        rpb.retrofit(model, UNSCALED)


def test_half_precision_says_where_it_cannot_hold() -> None:
    """Gemma 3's norm multiplies by one more than its weight: the scale would drown in bfloat16, and is refused."""
    for name, held in (("gemma3_text", False), ("qwen3", True)):
        model = build(BY_NAME[name]).to(torch.bfloat16)
        for attention in Anatomy.of(model).attentions.values():
            attention.scaling = 1 / 16
            attention.q_norm.weight.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
        before = copy.deepcopy(model.state_dict())
        if held:
            rpb.retrofit(model, UNSCALED)
            continue
        with pytest.raises(rpb.errors.ConfigError, match=r"cannot hold it in torch\.bfloat16: leave scale='source'"):
            rpb.retrofit(model, UNSCALED)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
