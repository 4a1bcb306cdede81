"""Transformers' Trainer and TRL's: they train tables and weights, and go on after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import rpb_retrofit as rpb
from tests.families.cases import BY_NAME
from tests.support.tensors import assert_close
from tests.support.tiny_models import build, closeness, logits_of, tables_of, tokens

RECIPE: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def transformers_trainer(model: Any, folder: Path, tokenizer: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **RECIPE), train_dataset=rows)


def trl_trainer(model: Any, folder: Path, tokenizer: Any) -> Trainer:
    rows = Dataset.from_dict({"text": [tokenizer.decode(row) for row in tokens(8)]})
    return SFTTrainer(
        model=model, args=SFTConfig(output_dir=str(folder), **RECIPE), train_dataset=rows, processing_class=tokenizer
    )


@pytest.mark.parametrize("make", [transformers_trainer, trl_trainer])
@pytest.mark.parametrize("shared", [False, True])
def test_trainers(make: Any, shared: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tables and weights train; an interrupted run continues to where an uninterrupted one ends."""

    def model() -> PreTrainedModel:
        model = build(BY_NAME["llama"])
        rpb.retrofit(model, rpb.RetrofitConfig(init="zeros", shared=shared))
        return model

    trainer = make(model(), tmp_path / "run", tokenizer)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trained = trainer.model
    for name, parameter in trained.named_parameters():
        assert not torch.equal(parameter, start[name]), name

    loaded = rpb.load(tmp_path / "run" / "checkpoint-4")
    assert len(tables_of(loaded)) == (1 if shared else 2)
    assert_close(tables_of(loaded), tables_of(trained))
    assert closeness(logits_of(loaded), logits_of(trained)) < 1e-6
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4", trust_remote_code=True)
    assert closeness(logits_of(saved), logits_of(trained)) < 1e-6

    resumed = make(model(), tmp_path / "run", tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_close(dict(resumed.model.named_parameters()), dict(trained.named_parameters()))
