"""Fine-tuning under DeepSpeed's ZeRO gives the weights of one plain process; what its engine would spoil is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from accelerate import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError, InterruptedRunError, RevertError, UnsupportedModelError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.training.recipe import Recipe
from rpb_retrofit.training.zero import CONFLICTING, check_zero
from tests.families.cases import BY_NAME, Case
from tests.support.deepspeed_cases import ZERO3, choose, under_deepspeed
from tests.support.tensors import assert_close, weights_of
from tests.support.tiny_models import CONFIG, build, inputs_of, retrofitted, tokens
from tests.support.training_cases import PROSE, SIZE, run, small_tokenizer, watch_steps, write_retrofit

TAUGHT: dict[str, Any] = {
    "objective": "distillation",
    "relations": 0.1,
    "stages": [
        {"train": train, "tokens": 384, "lengths": {64: 1}, "rate": 1e-3} for train in ("tables", "lora", "all")
    ],
}
"""Nine steps that read the teacher's weights, which the student shares, and frozen ones, which are cut as well."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of tied embeddings, its retrofit of one table for all layers with a tail, and a text."""
    base = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(base / "source")
    small_tokenizer().save_pretrained(base / "source")
    write_retrofit(base / "source", base / "retrofit", tail="log", shared=True)
    (base / "text.txt").write_text(PROSE)
    return base


def trained(base: Path, name: str, changes: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """What a run makes of the retrofit: its weights by name."""
    run(base / "retrofit", base / name, base / "text.txt", changes)
    return weights_of(base / name)


def _stopped_and_in_bfloat16(base: Path) -> None:
    third = 13  # of the second stage
    for zero in (2, 3):
        choose(zero)
        with pytest.MonkeyPatch.context() as patch:
            steps = watch_steps(patch, lambda number: number == third and os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(InterruptedRunError, match="SIGTERM after step 3 of 30 of stage 2"):
                trained(base, f"zero{zero}")
            trained(base, f"zero{zero}")
            assert len(steps) == 40, "nothing is trained twice"
        trained(base, f"zero{zero}-bf16", {"precision": "bf16"})


@pytest.mark.process
def test_one_process(models: Path) -> None:
    """A run that was stopped goes on; bfloat16 rounds no weight that is saved."""
    under_deepspeed(1, _stopped_and_in_bfloat16, models)
    plain, rounded = trained(models, "plain"), trained(models, "plain-bf16", {"precision": "bf16"})
    for zero in (2, 3):
        assert_close(weights_of(models / f"zero{zero}"), plain, atol=1e-4, rtol=1e-3)
        weights = weights_of(models / f"zero{zero}-bf16")
        assert_close(weights, rounded, atol=2e-2, rtol=1e-3)
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.relative_attention_bias.weight"):
            assert not torch.equal(weights[name], weights[name].bfloat16().float()), name
        rpb.load(models / f"zero{zero}")


def _taught(base: Path) -> None:
    choose(3)
    trained(base, "taught-zero3", TAUGHT)


@pytest.mark.process
def test_two_processes_learn_from_the_source(models: Path) -> None:
    under_deepspeed(2, _taught, models)
    assert_close(weights_of(models / "taught-zero3"), trained(models, "taught", TAUGHT), atol=1e-4, rtol=1e-3)


# --- models in pieces ----------------------------------------------------------------------------------------------

FAMILIES = [BY_NAME[name] for name in ("llama", "gpt_oss", "gpt2", "bert", "bart", "bloom", "falcon", "t5")]


def _in_pieces(base: Path) -> None:
    settings = json.loads(ZERO3.read_text())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    mesh = init_device_mesh("cpu", (1,))
    for case in FAMILIES:
        model, inputs = retrofitted(case), inputs_of(case, tokens())
        model.save_pretrained(base / str(case))
        with torch.no_grad():
            wanted = model(**inputs).logits
        for how in ("cut", "opened in pieces", "fsdp2"):
            keep = HfDeepSpeedConfig(settings) if how == "opened in pieces" else None
            loaded = rpb.load(base / str(case))
            if how == "fsdp2":
                for block in Anatomy.of(loaded).blocks:
                    fully_shard(loaded.get_submodule(block), mesh=mesh)
                running = fully_shard(loaded, mesh=mesh)
            else:
                running = deepspeed.initialize(model=loaded, config=settings)[0]
            running.eval()
            with torch.no_grad():
                torch.testing.assert_close(running(**inputs).logits, wanted, msg=f"{case}, {how}")
            assert "relative_attention_bias): RelativePositionBias(heads=4, buckets=8, max_dist" in repr(loaded)
            assert sum("buckets=8" in line for line in repr(loaded).splitlines()) == repr(model).count("buckets=8")
            _refuse(case, loaded, how)
            del keep
            unset_hf_deepspeed_config()


def _refuse(case: Case, retrofit: Any, how: str) -> None:
    """Neither a retrofit nor a plain model can be changed in place while it is in pieces."""
    with pytest.raises(RevertError):
        rpb.revert(retrofit)
    plain = build(case)
    if how == "fsdp2":
        fully_shard(plain)
    else:
        deepspeed.zero.Init(module=plain, config_dict_or_path=json.loads(ZERO3.read_text()))
    with pytest.raises(UnsupportedModelError, match=r"is sharded .*: retrofit, then shard"):
        rpb.retrofit(plain, CONFIG)
    changed = build(case)
    rpb.retrofit(changed, CONFIG)
    fully_shard(changed)
    with pytest.raises(RevertError, match="was sharded after the retrofit"):
        rpb.revert(changed)


@pytest.mark.process
def test_models_in_pieces(tmp_path: Path) -> None:
    """A model whose parameters are held in pieces says what it is, and computes what the whole one does."""
    under_deepspeed(1, _in_pieces, tmp_path)


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, Any] = {
    "gradient_accumulation_steps": 4,
    "fp16": {"enabled": True},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "tensor_parallel": {"autotp_size": 2},
    "sequence_parallel_size": 2,
}
HARMLESS: dict[str, Any] = {
    "gradient_accumulation_steps": "auto",
    "fp16": {"enabled": False},
    "bf16": {"enabled": False},
    "tensor_parallel": {"autotp_size": 1},
    "sequence_parallel_size": 1,
}


def accelerator_with(settings: dict[str, Any]) -> Any:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}, **settings})
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize("key", CONFLICTING)
def test_settings_that_contradict_the_recipe(key: str) -> None:
    check_zero(accelerator_with(HARMLESS), Recipe())
    with pytest.raises(ConfigError, match=f"^DeepSpeed's {key}=.*: ") as caught:
        check_zero(accelerator_with({**HARMLESS, key: REFUSED[key]}), Recipe())
    assert CONFLICTING[key] in str(caught.value)


@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"micro_tokens": 64}, {"on_bad_step": "skip"}], ids=str)
def test_recipes_that_its_engine_cannot_follow(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(changes))}.*FSDP2"):
        check_zero(accelerator_with({}), Recipe(**changes))
