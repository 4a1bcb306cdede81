"""Calibration of whole models: every family, what it leaves alone, and what it answers to wrong input."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError, DataError, RetrofitError
from rpb_retrofit.files.spool import temporary_spool
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import family_of
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.calibrate import Calibration
from rpb_retrofit.tables.fit import fit
from rpb_retrofit.tables.outputs import SHARE, fit_outputs
from tests.families.cases import BY_NAME, Case
from tests.support.calibration import CALIBRATED, FITTED, ROTARY, calibration_windows
from tests.support.tiny_models import CONFIG, VOCAB, build, check_decoding, inputs_of, tokens


@pytest.mark.parametrize("case", FITTED, ids=str)
def test_every_family(case: Case) -> None:
    """Each layer comes nearer to the source's: its outputs, or its attention where a model hands out nothing else;
    weights stay, and revert is exact."""
    model, untouched = build(case), build(case)
    before = model(**inputs_of(case, tokens())).logits
    report = rpb.retrofit(model, CALIBRATED, calibration=calibration_windows()).calibration
    assert [layer.name for layer in report.layers] and len(report.layers) == sum(
        getattr(model.config, name) for name in case.layers
    )
    whole = {"first": 0.0, "last": 0.0}
    for layer in report.layers:
        assert (layer.missed is None) != family_of(model.config).uses_interface
        first, last = torch.tensor(layer.before), torch.tensor(layer.after)
        if layer.missed is not None and layer.missed_by_attention is not None:
            first, last = (
                torch.tensor(missed) + SHARE * kl
                for missed, kl in ((layer.missed_by_attention, first), (layer.missed, last))
            )
        assert bool((last <= first + 1e-5).all()), layer.name
        whole["first"] += float(first.mean())
        whole["last"] += float(last.mean())
        assert sum(layer.visits) > 0
    # These sources are random: what they attend to says next to nothing of what they hand on, so that gains little.
    assert whole["last"] < 0.99 * whole["first"]
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in untouched.state_dict().items())
    rpb.revert(model)
    assert torch.equal(model(**inputs_of(case, tokens())).logits, before)


@pytest.mark.parametrize("case", FITTED, ids=str)
def test_every_attention_comes_nearer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first act alone, which the outputs start from: each layer's attention comes nearer to the source's."""
    monkeypatch.setattr("rpb_retrofit.tables.calibrate.fit_outputs", lambda pairs, layout, metric: fit(pairs, layout))
    report = rpb.retrofit(build(case), CALIBRATED, calibration=calibration_windows()).calibration
    for layer in report.layers:
        assert all(b <= a + 1e-5 for a, b in zip(layer.before, layer.after, strict=True)), layer.name
    assert report.after < 0.995 * report.before


def test_it_reports_what_it_reached() -> None:
    """The KL in the report is that of the attention weights, the source's by Transformers' own eager code."""
    case = BY_NAME["llama"]
    source, model = build(case, layers=1), build(case, layers=1)
    windows = calibration_windows()
    report = rpb.retrofit(model, CALIBRATED, calibration=windows).calibration
    source.set_attn_implementation("eager")
    with torch.no_grad():
        p, q = (m(windows[0], output_attentions=True).attentions[0].double() for m in (source, model))
    kl = torch.where(p > 0, p * (p / q.clamp(min=1e-300)).log(), 0).sum(-1).mean((0, 2))
    torch.testing.assert_close(torch.tensor(report.layers[0].after, dtype=torch.double), kl, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_tables() -> None:
    tables = []
    for seed in (0, 0, 1):
        model = build(BY_NAME["llama"])
        report = rpb.retrofit(model, replace(CALIBRATED, seed=seed), calibration=calibration_windows(300))
        tables.append(torch.stack([model.get_parameter(name).detach() for name in report.tables]))
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_the_upper_layers_are_fitted_on_the_lower_ones() -> None:
    """Layer by layer with the rest skipped gives what a whole forward pass of the finished model gives."""
    case = BY_NAME["bart"]  # two stacks, and tuples between the layers
    model = build(case)
    config, windows = CALIBRATED, [tokens(1, 40, seed=5)[0]]
    report = rpb.retrofit(model, config, calibration=windows)
    heard: dict[str, Tensor] = {}
    with temporary_spool(AttentionRows) as spool:
        whole = Calibration(Anatomy.of(model), windows, config.seed, spool)
        whole.record()  # the retrofit itself, whole
        last = report.layers_patched[-1]
        heard["whole"] = whole.spool["source", last, 0].query
    again = build(case)
    with temporary_spool(AttentionRows) as spool:
        stepwise = Calibration(Anatomy.of(again), windows, config.seed, spool)
        stepwise.record()
        kept = stepwise._keep

        def listen(name: str, number: int) -> Any:
            take = kept(name, number)

            def both(at: str, rows: Any) -> None:
                if at == name == last:
                    heard["stepwise"] = rows.query
                take(at, rows)

            return both

        stepwise._keep = listen  # type: ignore[method-assign]
        again.config.rpb_retrofit = model.config.rpb_retrofit
        from rpb_retrofit.runtime.modeling import attach

        attach(Anatomy.of(again))
        stepwise.apply()
    torch.testing.assert_close(heard["stepwise"], heard["whole"])


@pytest.mark.parametrize("case", ROTARY, ids=str)
@torch.no_grad()
def test_kept_frequencies_are_the_rotation_with_the_others_zeroed(case: Case) -> None:
    """Against the plain source, whose lower frequencies are set to zero by hand where that can be done."""
    model, source = build(case), build(case)
    plain = model(**inputs_of(case, tokens())).logits
    whole = rpb.retrofit(model, replace(CONFIG, keep_frequencies="auto"))
    kept = model.config.rpb_retrofit.get("kept_frequencies", {})
    rpb.revert(model)
    assert torch.equal(model(**inputs_of(case, tokens())).logits, plain) and whole.mechanism == "rope"
    if not kept:
        pytest.skip("no wavelength fits in the context of this tiny config")
    rpb.retrofit(model, replace(CONFIG, keep_frequencies=1))
    zeroed = 0
    for module in source.modules():
        for name, buffer in getattr(module, "_buffers", {}).items():
            if name.endswith("inv_freq"):
                buffer[1:] = 0
                zeroed += 1
    assert zeroed
    static = not re.search("dynamic|longrope", str(case))  # these compute their frequencies again
    kept_alone = model(**inputs_of(case, tokens())).logits
    if static:
        zeroed_by_hand = source(**inputs_of(case, tokens())).logits
        torch.testing.assert_close(kept_alone, zeroed_by_hand, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(kept_alone, plain, atol=1e-3) or len(buffer) == 1


def test_a_checkpoint_keeps_its_frequencies(tmp_path: Path) -> None:
    """Saved, loaded, decoded with a cache, left-padded: kept frequencies rotate by the real position."""
    case = BY_NAME["llama"]
    model = build(case)
    rpb.retrofit(model, replace(CALIBRATED, keep_frequencies=2), calibration=calibration_windows())
    model.save_pretrained(tmp_path)
    loaded = rpb.load(tmp_path)
    ids = tokens(1, 12)
    want = model(ids).logits
    assert torch.equal(loaded(ids).logits, want)
    check_decoding(loaded, ids)


def test_an_alibi_source_is_reproduced() -> None:
    """A small Bloom, trained for a moment: inside the maximum distance calibrated tables lose next to nothing."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=32, hidden_size=64, n_head=4, n_layer=2, bos_token_id=1, eos_token_id=2)
    model = BloomForCausalLM(config)

    def batch(seed: int, length: int = 32) -> Tensor:  # each token repeats the one before the last, mostly
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 32, (16, length), generator=generator)
        for i in range(2, length):
            copy = torch.rand(16, generator=generator) < 0.8
            ids[copy, i] = ids[copy, i - 2]
        return ids

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(200):
        loss = model(batch(step), labels=batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    @torch.no_grad()
    def score() -> float:
        return model(batch(999), labels=batch(999)).loss.item()

    source = score()
    rpb.retrofit(model, replace(CONFIG, relative_attention_num_buckets=64, relative_attention_max_distance=64))
    zeros = score()
    rpb.revert(model)
    rpb.retrofit(
        model,
        rpb.RetrofitConfig(relative_attention_num_buckets=64, relative_attention_max_distance=64),
        calibration=[batch(1000)],
    )
    assert source < 2.8, "the source learned to look back"
    assert zeros - source > 0.05, "and needs its positions for it"
    assert score() - source < 0.01


@pytest.mark.parametrize(
    ("config", "calibration", "answer"),
    [
        (CALIBRATED, None, "init='calibrated' needs text: give calibration=[batches of token ids], or choose another"),
        (CONFIG, calibration_windows(), "calibration was given, but init='zeros' uses none"),
        (CALIBRATED, [], "calibration: no text"),
        (CALIBRATED, [torch.arange(3, 9)], "calibration: a window of 6 tokens"),
        (CALIBRATED, [torch.rand(2, 48)], "calibration: torch.float32 of shape (2, 48)"),
        (CALIBRATED, [torch.full((48,), VOCAB)], f"calibration: token id {VOCAB}; the model knows {VOCAB}"),
        (
            CALIBRATED,
            [{"input_ids": tokens(1, 48), "attention_mask": torch.arange(48)[None] > 3}],
            "calibration: a batch is padded",
        ),
        (replace(CONFIG, keep_frequencies=9), None, "keep_frequencies=9: 'LlamaForCausalLM' has 4 in inv_freq"),
    ],
)
def test_wrong_input(config: rpb.RetrofitConfig, calibration: Any, answer: str) -> None:
    """One clear line, and the model as it was."""
    model, plain = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    with pytest.raises(RetrofitError, match=re.escape(answer)) as error:
        rpb.retrofit(model, config, calibration=calibration)
    assert isinstance(error.value, (ConfigError, DataError)) and "\n" not in str(error.value)
    assert type(model) is type(plain) and not hasattr(model.config, "rpb_retrofit")
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


def test_frequencies_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="has learned positions and no frequencies"):
        rpb.retrofit(build(BY_NAME["gpt2"]), replace(CONFIG, keep_frequencies="auto"))


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the fit leaves the source, not half a retrofit."""
    model, plain = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit_outputs(*args)

    monkeypatch.setattr("rpb_retrofit.tables.calibrate.fit_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rpb.retrofit(model, CALIBRATED, calibration=calibration_windows())
    assert isinstance(model, nn.Module) and type(model) is type(plain) and not hasattr(model.config, "rpb_retrofit")
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
