"""Frequencies that are kept: what a setting means for a model, and that each layer rotates just these."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.frequencies import KeepFrequencies
from rpb_retrofit.instruments.interception import intercepted
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.factor import ContentFactor
from rpb_retrofit.swap.kept_frequencies import keep, kept_by_attention
from tests.families.cases import BY_NAME, Case
from tests.support.calibration import CALIBRATED, ROTARY, calibration_windows
from tests.support.tiny_models import CONFIG, build, check_decoding, inputs_of, tokens

MEANT: list[tuple[str | int, dict[str, int], list[int]]] = [
    (2, {"inv_freq": 2}, []),
    ("all", {"inv_freq": 4}, []),
    ("0", {}, []),
    ("0,1:0", {}, []),
    ("1,1:3", {"inv_freq": 3}, [1, 3]),
    ("1,0-1:3", {"inv_freq": 3}, []),
    ("1:all", {"inv_freq": 4}, [0, 4]),
    ("all,0:2", {"inv_freq": 4}, [2, 4]),
    ("3,0-1:1,1:2", {"inv_freq": 2}, [1, 2]),
]


@pytest.mark.parametrize(("asked", "by_buffer", "in_layers"), MEANT, ids=lambda value: str(value))
def test_what_a_setting_means(asked: str | int, by_buffer: dict[str, int], in_layers: list[int]) -> None:
    anatomy = Anatomy.of(build(BY_NAME["llama"]))
    assert keep(anatomy, KeepFrequencies.of(asked)) == (by_buffer, in_layers)


def test_by_the_type_of_layers() -> None:
    anatomy = Anatomy.of(build(BY_NAME["gemma3_text"]))
    types = list(anatomy.layer_types.values())
    assert set(types) == {"sliding_attention", "full_attention"}
    kept = keep(anatomy, KeepFrequencies.of("sliding_attention:all"))
    has = anatomy.rotary_counts
    assert kept.by_buffer == {
        "sliding_attention_inv_freq": has["sliding_attention_inv_freq"],
        "full_attention_inv_freq": 0,
    }
    assert kept.in_layers == [], "all layers of a type keep what their buffer does"


@pytest.mark.parametrize("context", [64, 512, 4096])
def test_auto_keeps_what_turns_nine_tenths(context: int) -> None:
    """One by one, against the angle at the end of the context."""
    model = build(BY_NAME["llama"])
    model.config.max_position_embeddings = context
    anatomy = Anatomy.of(model)
    turns = [float(f) * context / (2 * torch.pi) for f in anatomy.inverse_frequencies["inv_freq"]]
    assert keep(anatomy, KeepFrequencies.of("auto")).by_buffer.get("inv_freq", 0) == sum(t >= 0.9 for t in turns)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), max_size=4), st.integers(0, 9))
def test_the_last_rule_holds(rules: list[tuple[int, int, int]], every: int) -> None:
    written = ",".join([str(every), *(f"{min(a, b)}-{max(a, b)}:{amount}" for a, b, amount in rules)])
    read = KeepFrequencies.of(written)
    for layer in range(6):
        amounts = [amount for a, b, amount in rules if min(a, b) <= layer <= max(a, b)]
        assert read.of_layer(layer, None) == (amounts or [every])[-1]


@pytest.mark.parametrize("case", ROTARY, ids=str)
@torch.no_grad()
def test_each_layer_rotates_its_own(case: Case) -> None:
    """Queries and keys of each attention, on the same inputs, are those of a retrofit that keeps as many everywhere."""
    counts = Anatomy.of(build(case)).rotary_counts
    few, many = 1, min(counts.values())
    if many < 2 or not Anatomy.of(build(case)).family.uses_interface:
        pytest.skip("one frequency, or an attention that keeps its queries to itself")
    heard = {setting: _first_queries(case, setting) for setting in (f"{few},1:{many}", few, many)}
    for number, (name, queries) in enumerate(heard[f"{few},1:{many}"].items()):
        want = heard[many if number == 1 else few][name]
        for mine, its in zip(queries, want, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)
        other = heard[few if number == 1 else many][name]
        assert not torch.equal(queries[0], other[0]) or case.family == "llama4_text", "a difference but for NoPE layers"


def _first_queries(case: Case, setting: int | str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys by attention, where every layer is given the same hidden states."""
    model = build(case)
    rpb.retrofit(model, replace(CONFIG, keep_frequencies=setting))
    anatomy, heard = Anatomy.of(model), {}
    given = torch.randn(2, 12, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))

    def listen(name: str, attend: Any) -> Any:
        def run(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            heard[name] = query, key
            return attend(module, query, key, *args, **kwargs)

        return run

    def same(module: Any, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": given}
        return (given, *args[1:]), kwargs

    for module in anatomy.attentions.values():
        module.register_forward_pre_hook(same, with_kwargs=True)
    with intercepted(anatomy, listen):
        model(**inputs_of(case, tokens(2, 12)))
    return heard


@torch.no_grad()
def test_a_checkpoint_keeps_them_by_layer(tmp_path: Path) -> None:
    """Saved, loaded, copied, decoded with a cache and left-padded; factors only where a frequency is still."""
    case, settings = BY_NAME["llama"], {"keep_frequencies": "1,1:3", "calibrate": "tables+content"}
    model, plain = build(case), build(case)
    rpb.retrofit(model, replace(CALIBRATED, **settings), calibration=calibration_windows())
    model.save_pretrained(tmp_path)
    loaded, ids = rpb.load(tmp_path), tokens(1, 12)
    assert loaded.config.rpb_retrofit["kept_in_layers"] == [1, 3]
    want = model(ids).logits
    assert torch.equal(loaded(ids).logits, want) and torch.equal(copy.deepcopy(model)(ids).logits, want)
    check_decoding(loaded, ids)
    rpb.revert(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_factors_stand_where_nothing_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(BY_NAME["llama"])
    monkeypatch.setattr("rpb_retrofit.swap.inplace.fold", lambda *args: None)
    settings = {"keep_frequencies": "1,1:3", "calibrate": "tables+content"}
    rpb.retrofit(model, replace(CALIBRATED, **settings), calibration_windows())
    factors = [m.weight for m in model.modules() if isinstance(m, ContentFactor)]
    kept = kept_by_attention(Anatomy.of(model), model.config.rpb_retrofit)
    assert list(kept.values()) == [1, 3]
    for factor, count in zip(factors, kept.values(), strict=True):
        one = (factor == torch.tensor([1.0, 0.0])).all(-1).all(0)
        assert one[:count].all() and not one[count:].any()


def test_a_layer_that_keeps_all_has_its_weights_as_they_were() -> None:
    model, plain = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    settings = {"keep_frequencies": "1,1:all", "calibrate": "tables+content"}
    report = rpb.retrofit(model, replace(CALIBRATED, **settings), calibration_windows())
    assert any("folded into 1 weights" in note for note in report.notes)
    weights = plain.state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights.get(name, value))]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="keep_frequencies=9: 'LlamaForCausalLM' has 4 in inv_freq; keep fewer"):
        rpb.retrofit(build(BY_NAME["llama"]), replace(CONFIG, keep_frequencies="1,1:9"))
