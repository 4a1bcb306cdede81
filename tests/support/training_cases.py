"""A small language model with a tokenizer, its retrofit, and runs of a few steps on them, also as processes to kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rpb_retrofit as rpb
from rpb_retrofit.training.recipe import Recipe
from rpb_retrofit.training.run import finetune, finetune_arms
from rpb_retrofit.training.step import Stepper
from rpb_retrofit.training.summary import Summary
from tests.support.tensors import weights_of

VOCAB = 512
PROSE = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:60_000]

SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}

RECIPE: dict[str, Any] = {
    "stages": [
        {"train": "tables", "tokens": 1280, "lengths": {64: 1}},
        {"train": "all", "tokens": 3840, "lengths": {32: 1, 64: 3}, "rate": 1e-3},
    ],
    "objective": "next-token",
    "batch_tokens": 128,
    "save_every": 5,
    "evaluate_every": 100,
    "evaluate_tokens": 512,
    "trackers": [],
}
"""Forty steps."""


def small_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<mask>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", mask_token="<mask>", pad_token="<pad>"
    )


def write_source(folder: Path) -> Path:
    """A Llama of two layers and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def write_encoder(folder: Path, head: bool) -> Path:
    """A BERT of two layers, with its head for masked tokens or bare, and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(**SIZE, max_position_embeddings=128)
    (BertForMaskedLM if head else BertModel)(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def write_retrofit(source: Path, folder: Path, **settings: Any) -> Path:
    """Its retrofit."""
    from rpb_retrofit.checkpoint.convert import retrofit_checkpoint

    retrofit_checkpoint(str(source), folder, rpb.RetrofitConfig(**{"init": "normal", **settings}))
    return folder


def run(retrofit: Path, out: Path, text: Path, changes: dict[str, Any] | None = None, **options: Any) -> Summary:
    """`finetune` by `RECIPE` with changes, on a text."""
    # Accelerate keeps its settings for the life of a process, and refuses others (another precision, say).
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = Recipe.model_validate({**RECIPE, "data": [{"name": str(text)}], **(changes or {})})
    return finetune(str(retrofit), out, recipe, **{"say": lambda text: None, **options})


def run_arms(retrofit: Path, out: Path, text: Path, changes: dict[str, Any]) -> dict[str, Summary]:
    """`finetune_arms` with the retrofit and its control."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = Recipe.model_validate({**RECIPE, "data": [{"name": str(text)}], **changes})
    return finetune_arms(str(retrofit), out, recipe, ["retrofit", "control"], say=lambda text: None)


def run_alone(retrofit: Path, out: Path, text: Path, changes: dict[str, Any] | None = None, rest: float = 0.0) -> None:
    """`run` in a process of its own, that a test kills; it rests for so many seconds before every step."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    watch_steps(pytest.MonkeyPatch(), lambda number: time.sleep(rest))
    run(retrofit, out, text, changes)


def watch_steps(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object] = lambda number: None) -> list[int]:
    """Have ``before`` called before every step with its number, counted from 1 over all runs; the numbers so far."""
    take, numbers = Stepper.take, list[int]()

    def step(self: Stepper, interruption: Any) -> Any:
        numbers.append(len(numbers) + 1)
        before(numbers[-1])
        return take(self, interruption)

    monkeypatch.setattr(Stepper, "take", step)
    return numbers


UP = "model.layers.1.mlp.up_proj.weight"


def poison(monkeypatch: pytest.MonkeyPatch, at: int, name: str = UP, factor: float = math.inf) -> None:
    """One step with a weight multiplied by a factor."""
    take, steps = Stepper.take, 0

    def step(self: Stepper, interruption: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != at:
            return take(self, interruption)
        weight = self.model.get_parameter(name)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight *= factor
        try:
            return take(self, interruption)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    monkeypatch.setattr(Stepper, "take", step)


def losses(folder: Path) -> list[float]:
    """Of all stages' steps, in order."""
    return [loss for stage in json.loads((folder / "training.json").read_text())["stages"] for loss in stage["losses"]]


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same weights bit for bit, and the same losses."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses(one) == losses(other)
