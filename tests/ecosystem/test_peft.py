"""PEFT: adapters on a retrofit, saved, loaded and merged; and what they name as their base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.runtime.anatomy import submodels
from tests.families.cases import BY_NAME
from tests.support.tiny_models import CONFIG, build, closeness, logits_of, retrofitted, tables_of, tokens


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("with_tables", [False, True])
def test_peft(with_tables: bool, tmp_path: Path) -> None:
    base, also_trained = retrofitted(BY_NAME["llama"]), ["relative_attention_bias"] if with_tables else None
    base.save_pretrained(tmp_path / "base")
    before, plain = tables_of(base), logits_of(base)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=also_trained,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    train(model)
    trained = logits_of(model)
    assert closeness(trained, plain) > 1e-2
    model.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(rpb.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(again), trained)

    merged = again.merge_and_unload()
    assert type(merged).__name__ == "RpbLlamaForCausalLM"
    assert closeness(logits_of(merged), trained) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    loaded = rpb.load(tmp_path / "merged")
    assert torch.equal(logits_of(loaded), logits_of(merged))
    assert tables_of(loaded).keys() == before.keys()
    for name, values in tables_of(loaded).items():
        assert torch.equal(values, before[name]) != with_tables, name


@pytest.mark.parametrize("with_tables", [False, True])
def test_an_adapter_does_not_name_the_source(with_tables: bool, tmp_path: Path) -> None:
    """Whoever loads an adapter of a model that was retrofitted in place gets the retrofit or an error that says how."""
    build(BY_NAME["llama"]).save_pretrained(tmp_path / "source")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    rpb.retrofit(base, CONFIG)
    source = str(tmp_path / "source")
    assert base.config.rpb_retrofit["source"] == source
    assert all(source not in (m.name_or_path, m.config.name_or_path) for m in submodels(base))
    saved = copy.deepcopy(base)
    saved.save_pretrained(tmp_path / "base")

    def adapter(base: Any, name: str) -> Tensor:
        torch.manual_seed(0)
        lora = LoraConfig(
            target_modules=["q_proj"], modules_to_save=["relative_attention_bias"] if with_tables else None
        )
        model = get_peft_model(base, LoraConfig(**{**lora.to_dict(), "task_type": "CAUSAL_LM"}))
        train(model)
        model.save_pretrained(tmp_path / name)
        for file in ("adapter_config.json", "README.md"):
            assert source not in (tmp_path / name / file).read_text()
        return logits_of(model)

    adapter(base, "of memory")
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"retrofit in memory. Save it, load it with rpb_retrofit\.load"):
            auto.from_pretrained(tmp_path / "of memory")
    wanted = adapter(saved, "of a folder")
    with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\)"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "of a folder")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "of a folder", trust_remote_code=True)
    assert torch.equal(logits_of(loaded), wanted)


def test_names_come_back_with_the_source(tmp_path: Path) -> None:
    build(BY_NAME["t5"]).save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)

    def names() -> list[tuple[str, str]]:
        return [(m.name_or_path, m.config.name_or_path) for m in submodels(model)]

    before = names()
    rpb.retrofit(model, CONFIG)
    assert all(str(tmp_path) not in pair for pair in names())
    rpb.revert(model)
    assert names() == before and (str(tmp_path),) * 2 in before
