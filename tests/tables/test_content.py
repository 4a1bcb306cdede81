"""Factors on the content term: what they are, where they fold, and that a checkpoint with them is the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.errors import CheckpointError, MissingTablesError, UnsupportedModelError
from rpb_retrofit.files.shards import overwrite
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.factor import ContentFactor, RotaryPairs, turned
from rpb_retrofit.runtime.families import FACTOR, family_of
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from tests.families.cases import BY_NAME, Case
from tests.support.calibration import ROTARY, calibration_windows
from tests.support.tiny_models import CONFIG, build, inputs_of, tokens
from tests.support.tokenizers import WORDS, tokenizer_of_words

CONTENT = replace(CONFIG, init="calibrated", calibrate="tables+content")
SERVED = [case for case in ROTARY if family_of(build(case).config).uses_interface]
NORM_BETWEEN = ("qwen3", "gemma3", "olmo2", "llama4")


def keeps_factors(case: Case) -> bool:
    """Whether a norm stands between the query projection and the scores."""
    return str(case).startswith(NORM_BETWEEN)


def logits(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(case, tokens())).logits


@given(st.sampled_from(["half", "interleaved"]), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2**30))
def test_a_factor_is_a_complex_product(pairing: str, start: int, frequencies: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, 10, generator=generator)
    factor = torch.randn(3, frequencies, 2, generator=generator)
    result = turned(x, factor, RotaryPairs(pairing, start, frequencies))
    middle = x[..., start : start + 2 * frequencies]
    pairs = middle.unflatten(-1, (2, -1)).mT if pairing == "half" else middle.unflatten(-1, (-1, 2))
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(factor)[:, None])
    product = (product.mT if pairing == "half" else product).flatten(-2)
    want = torch.cat([x[..., :start], product, x[..., start + 2 * frequencies :]], -1)
    torch.testing.assert_close(result, want)


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_every_rotary_family(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors bring attention nearer than tables alone; folding them changes nothing; revert is exact."""
    source = build(case)
    plain = logits(source, case)
    model = build(case)
    tables = rpb.retrofit(model, replace(CONTENT, calibrate="tables"), calibration_windows()).calibration
    unfolded = build(case)
    with monkeypatch.context() as patch:
        patch.setattr("rpb_retrofit.swap.inplace.fold", lambda *args: None)
        result = rpb.retrofit(unfolded, CONTENT, calibration_windows()).calibration
    assert result.after < 0.97 * tables.after
    factors = [m.weight for m in unfolded.modules() if isinstance(m, ContentFactor)]
    assert len(factors) == len(result.layers) and all((w - torch.tensor([1.0, 0])).abs().max() > 1e-3 for w in factors)

    model = build(case)
    report = rpb.retrofit(model, CONTENT, calibration_windows())
    kept = [name for name, _ in model.named_parameters() if FACTOR in name]
    assert bool(kept) == keeps_factors(case) == (FACTOR in model.config.rpb_retrofit)
    assert ("a norm stands between" if kept else "folded into") in str(report)
    torch.testing.assert_close(logits(model, case), logits(unfolded, case), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(logits(model, case), plain, atol=1e-3)
    rpb.revert(model)
    assert torch.equal(logits(model, case), plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_the_pairs_are_those_that_rotate(case: Case) -> None:
    """Against the model's own rotation: query times key, pair by pair, turns with the offset and nothing else does."""
    from rpb_retrofit.tables.recording import run, watch

    model = build(case).eval()
    anatomy = Anatomy.of(model)
    heard: dict[str, AttentionRows] = {}
    same = torch.full((24,), 7)  # one token throughout: positions alone tell the first layer's queries apart
    with watch(anatomy) as listen:
        listen(heard.__setitem__, range(23, -1, -1))
        run(model, same)
    first = heard[next(name for name in anatomy.attentions)]
    pairs = anatomy.rotary_pairs
    query = first.query.flip(1)  # positions ascending
    a, b = (query[..., index].double() for index in pairs.dimensions())
    turn = torch.complex(a, b)[:, 1:] / torch.complex(a, b)[:, :-1]  # from position to position
    frequencies = [buffer.double() for buffer in anatomy.inverse_frequencies.values()]  # Gemma 3 has two
    still = [d for d in range(query.shape[-1]) if d not in torch.cat(pairs.dimensions())]
    assert (query[..., still] - query[:, :1, still]).abs().max() < 1e-5 if still else True
    if "dynamic" in str(case) or "longrope" in str(case):
        frequencies = [turn[0, 0].angle().abs()]  # computed anew by length
    torch.testing.assert_close(turn.abs(), torch.ones_like(turn.abs()), rtol=1e-4, atol=1e-4)
    angle = turn.angle().abs()
    assert any(torch.allclose(angle, frequency.expand(turn.shape), rtol=1e-3, atol=1e-4) for frequency in frequencies)


@pytest.mark.parametrize("keep", [0, 2])
def test_kept_frequencies_have_no_factor(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(BY_NAME["llama"])
    monkeypatch.setattr("rpb_retrofit.swap.inplace.fold", lambda *args: None)
    rpb.retrofit(model, replace(CONTENT, keep_frequencies=keep), calibration_windows())
    for factor in (m.weight for m in model.modules() if isinstance(m, ContentFactor)):
        one = (factor == torch.tensor([1.0, 0.0])).all(-1).all(0)
        assert one[:keep].all() and not one[keep:].any()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "deepseek_v3", "gpt_oss", "modernbert"])
@pytest.mark.parametrize("link", [False, True])
def test_a_checkpoint_has_them_too(name: str, link: bool, tmp_path: Path) -> None:
    """On disk as in memory; only shards with query projections are rewritten, and never the source's."""
    case = BY_NAME[name]
    source = tmp_path / "source"
    build(case).save_pretrained(source, max_shard_size="8KB")
    tokenizer_of_words().save_pretrained(source)
    before = {file.name: file.read_bytes() for file in source.glob("*.safetensors")}
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (400,), generator=generator)]
    calibration = CalibrationText(Text("words", [" ".join(words)]), tokens=128, length=32)
    done = retrofit_checkpoint(str(source), tmp_path / "out", CONTENT, link=link, calibration=calibration)
    assert {file.name: file.read_bytes() for file in source.glob("*.safetensors")} == before
    model = build(case)
    windows = calibration.windows(tokenizer_of_words(), None)
    rpb.retrofit(model, CONTENT, windows)
    loaded = rpb.load(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded, case), logits(model, case), rtol=1e-5, atol=1e-6)
    changed = {
        key for key, value in stored(tmp_path / "out").items() if not torch.equal(value, stored(source).get(key, value))
    }
    assert bool(changed) != keeps_factors(case)
    assert all(any(part in key for part in ("q_proj", "q_b_proj", "query_key_value", "Wqkv")) for key in changed)
    if link:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        rewritten = {index[key] for key in changed}
        for shard in set(index.values()) - {index[key] for key in index if "relative_" in key}:
            assert ((tmp_path / "out" / shard).stat().st_nlink == 1) == (shard in rewritten)
    assert not list((tmp_path / "out").glob("*.linked")) and done.out == tmp_path / "out"


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
    return tensors


def test_parameters_that_are_kept_are_saved_and_missed(tmp_path: Path) -> None:
    """Where a norm stands between, the factors are parameters: saved, loaded, float32, and missed when lost."""
    case = BY_NAME["qwen3"]
    model = build(case)
    rpb.retrofit(model, CONTENT, calibration_windows())
    model.save_pretrained(tmp_path)
    loaded = rpb.load(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if FACTOR in name:
            assert torch.equal(loaded.get_parameter(name), parameter) and parameter.dtype == torch.float32
    assert torch.equal(logits(rpb.load(tmp_path).eval(), case), logits(model, case))
    assert loaded(tokens()).logits.isfinite().all()
    tensors = stored(tmp_path)
    from safetensors.torch import save_file

    save_file({k: v for k, v in tensors.items() if FACTOR not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MissingTablesError, match=FACTOR):
        rpb.load(tmp_path)


def test_interrupted_while_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the projections are folded already: the source comes back all the same."""
    from rpb_retrofit.tables import folding

    model, plain = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    turn, calls = folding._turn_rows, []

    def interrupted(*args: Any) -> None:
        calls.append(turn(*args))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(folding, "_turn_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rpb.retrofit(model, CONTENT, calibration_windows())
    assert type(model) is type(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert", "BertForMaskedLM has no rotary frequencies"), ("falcon-rope", "FalconForCausalLM keeps its queries")],
)
def test_where_there_are_none(name: str, reason: str) -> None:
    model = build(BY_NAME[name])
    with pytest.raises(UnsupportedModelError, match=reason):
        rpb.retrofit(model, CONTENT, calibration_windows())
    assert not hasattr(model.config, "rpb_retrofit")


def test_a_checkpoint_that_keeps_its_weights_otherwise(tmp_path: Path) -> None:
    """No tensor with the bits of the query projection: said, and nothing is written."""
    from safetensors.torch import save_file

    from rpb_retrofit.checkpoint.rewrite import Change, rewrite

    save_file({"layer.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layer.weight' is changed .* no tensor like it"):
        rewrite(
            tmp_path,
            {"layer.weight": "a.safetensors"},
            {"model.layer.weight": Change(torch.zeros(2, 2), torch.ones(2, 2))},
        )
    rewrite(
        tmp_path,
        {"layer.weight": "a.safetensors"},
        {"model.layer.weight": Change(torch.ones(2, 2), torch.full((2, 2), 3.0))},
    )
    assert torch.equal(stored(tmp_path)["layer.weight"], torch.full((2, 2), 3.0))
    (tmp_path / "b.safetensors").hardlink_to(tmp_path / "a.safetensors")
    overwrite(tmp_path / "b.safetensors", {"layer.weight": torch.zeros(2, 2).numpy().tobytes()})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("layer.weight"), torch.full((2, 2), 3.0)), "a link is never written through"
