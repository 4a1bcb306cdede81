"""Tiny random models of every family under contract, their retrofits, and what tests ask of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.runtime.interface import BACKEND
from tests.families.cases import BY_NAME, CASES, Case

VOCAB, LENGTH, BUCKETS, MAX_DISTANCE = 61, 20, 8, 16
CONFIG = rpb.RetrofitConfig(
    init="zeros", relative_attention_num_buckets=BUCKETS, relative_attention_max_distance=MAX_DISTANCE
)
AUTO = {"causal": "AutoModelForCausalLM", "encoder": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}
every_family = pytest.mark.parametrize("case", CASES, ids=str)


def families(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test with these of the cases."""
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=str)


def build(case: Case, layers: int = 2, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model with weights large enough for its positions to matter."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, case.model)
    settings = {**case.settings, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings |= dict.fromkeys(case.layers, layers) | overrides
    if case.kind == "seq2seq":
        settings["decoder_start_token_id"] = 1
    for name in ("layer_types", "no_rope_layers"):
        if name in settings:
            settings[name] = settings[name][:layers]
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "norm" not in name.lower():
                parameter.normal_(0, 0.3)
    return model


def retrofitted(case: Case, random_tables: bool = True, **kwargs: Any) -> PreTrainedModel:
    """The retrofit of what `build` makes, its report checked; its tables random, or zeros."""
    model = build(case, **kwargs)
    report = rpb.retrofit(model, CONFIG)
    assert report.mechanism in ("rope", "learned", "sinusoidal", "alibi", "t5")
    assert len(report.layers_patched) == report.layers_expected
    assert report.layers_expected == sum(getattr(model.config, name) for name in case.layers)
    assert report.parameters_added == report.layers_expected * 4 * BUCKETS
    if random_tables:
        with torch.no_grad():
            for name in report.tables:
                model.get_parameter(name).normal_(0, 1)
    return model


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Random ids (batch, length) int64, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(case: Case, ids: Tensor, **extra: Any) -> dict[str, Any]:
    """``ids`` for the side that is looked at: the decoder's of a seq2seq model, whose encoder reads something fixed."""
    if case.kind == "seq2seq":
        return {"input_ids": tokens(ids.shape[0], 11, seed=7), "decoder_input_ids": ids, **extra}
    return {"input_ids": ids, **extra}


def closeness(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def logits_of(model: PreTrainedModel) -> Tensor:
    """Of `tokens()`, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(tokens()).logits


def tables_of(model: Any) -> dict[str, Tensor]:
    """Copies of the tables by parameter name, also of a model that PEFT wraps."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "relative_attention_bias." in name}


def ways(model: PreTrainedModel) -> Counter[str]:
    """How many attention modules last took each backend of the engine."""
    return Counter(vars(module)[BACKEND] for module in model.modules() if BACKEND in vars(module))


def saved_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json, without what Transformers changes in it at every load."""
    config = json.loads((folder / "config.json").read_text())
    config.get("attn_config", {}).pop("dtype", None)  # Transformers sets MPT's nested one at load, in any model
    return config


def check_decoding(model: Any, ids: Tensor) -> None:
    """What a model generates after ids (1, n) is the same without a cache, and padded on the left."""
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids, **options)
    assert torch.equal(alone, model.generate(ids, use_cache=False, **options))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 5:], alone)
