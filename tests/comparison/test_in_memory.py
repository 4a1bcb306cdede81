"""`rpb_retrofit.compare` as a notebook calls it: nothing on disk unless wanted, wrong input in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.files.journal import SUFFIX
from tests.support.training_cases import PROSE, SIZE, small_tokenizer, write_source

SCORED, FITTED = PROSE[:8000], PROSE[8000:16000]
SETTINGS: dict[str, Any] = {
    **{"target_length": 512, "lengths": [64, 256], "tokens": 1024, "items": 1, "asked": [256], "rounds": 0},
    **{"calibration_tokens": 512, "calibration_length": 128, "arms": ["yarn", "t5"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with RoPE."""
    return write_source(tmp_path_factory.mktemp("memory") / "source")


def test_nothing_is_written_and_the_model_stays_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = open_causal_lm(str(source))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    monkeypatch.chdir(tmp_path)
    result = rpb.compare(model, tokenizer=tokenizer, data=[SCORED], calibration=[FITTED], **SETTINGS)
    assert not os.listdir()
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.headline in str(result) and [row["id"] for row in result.rows] == ["source", "yarn", "t5"]
    call = result.document["command"]
    assert call.startswith(f"rpb_retrofit.compare({str(source)!r}, target_length=512, arms=['yarn', 't5'], data=[...]")
    assert "bos" not in call, "what is the default is left out"
    result.write_card(tmp_path / "card.md")
    assert result.headline in (tmp_path / "card.md").read_text()


def test_an_interrupted_comparison_of_a_model_in_memory_goes_on_with_that_model_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = open_causal_lm(str(source))
    settings = {**SETTINGS, "arms": ["yarn"], "items": 0, "asked": None, "out": tmp_path / "out"}
    texts = {"data": [SCORED], "calibration": [FITTED]}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rpb_retrofit.comparison.result.ComparisonResult.of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rpb.compare(model, tokenizer=tokenizer, **texts, **settings)
    assert len([*(tmp_path / "out.run").glob(f"*{SUFFIX}")]) == 4, "two are made and measured"
    before = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match="holds an examination with other weights"):
        rpb.compare(model, tokenizer=tokenizer, **texts, **settings)
    with torch.no_grad():
        model.lm_head.weight.copy_(before)
    result = rpb.compare(model, tokenizer=tokenizer, **texts, **settings)
    assert (tmp_path / "out" / "report.json").read_text() == result.as_json() and not (tmp_path / "out.run").exists()


def small() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=256))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no tokenizer": (lambda: rpb.compare(small()), ConfigError, "is a loaded model: give its tokenizer too"),
    "a tokenizer of a folder": (
        lambda: rpb.compare("here", data=["text"], calibration=["other"], tokenizer=small_tokenizer()),
        ConfigError,
        "'here' is read with its own",
    ),
    "no model": (lambda: rpb.compare(5), ConfigError, "a int is neither a name nor a model of Transformers"),
    "an encoder": (
        lambda: rpb.evaluate(BertModel(BertConfig(**SIZE)), tokenizer=small_tokenizer()),
        DataError,
        "is a BertModel: only models that predict the next token",
    ),
    "no text": (lambda: rpb.evaluate(small(), tokenizer=small_tokenizer(), data=[" "]), DataError, "holds no text"),
    "numbers": (lambda: rpb.evaluate("here", data=[5]), DataError, "holds int, not text"),
    "one text for both": (lambda: rpb.compare("here", data=["a"], calibration=["a"]), ConfigError, "is the --data too"),
    "a short target": (lambda: rpb.compare("here", target_length=1), ConfigError, "--target-length 1: at least 2"),
    "lengths of 1": (lambda: rpb.evaluate("here", lengths=[1]), ConfigError, "--lengths 1: give lengths of at least 2"),
    "training without text": (lambda: rpb.compare("here", heal=9), ConfigError, "--heal needs text to train on"),
    "text without training": (
        lambda: rpb.compare("here", train_data="x"),
        ConfigError,
        "--train-data would go unused",
    ),
    "no rates": (lambda: rpb.compare("here", rates=[]), ConfigError, "give at least one"),
    "an unknown arm": (lambda: rpb.compare("here", arms=["yran"]), ConfigError, "did you mean 'yarn'"),
    "a budget beyond the constraint": (
        lambda: rpb.compare("here", heal=5_000_000, train_tokens=1_500_000, train_data="x"),
        ConfigError,
        "--heal 5M and --train-tokens 1500k contradict each other",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    call, error, answer = WRONG[case]
    with pytest.raises(error) as caught:
        call()
    assert answer in str(caught.value) and "\n" not in str(caught.value)
