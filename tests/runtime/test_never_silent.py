"""Ways in which a retrofit could silently become something else: each is either right or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.errors import AttentionImplementationError, CheckpointError, ConfigError, RevertError
from tests.families.cases import BY_NAME
from tests.support.tiny_models import CONFIG, build, closeness, retrofitted, tokens

LLAMA = BY_NAME["llama"]
SHARED = rpb.RetrofitConfig(
    init="zeros", relative_attention_num_buckets=8, relative_attention_max_distance=16, shared=True
)


def sees_the_future(model: PreTrainedModel) -> bool:
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] = 5
    with torch.no_grad():
        return not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_a_decoder_made_bidirectional(name: str) -> None:
    model = build(BY_NAME[name], is_causal=False)
    assert sees_the_future(model), "else this test says nothing"
    rpb.retrofit(model, CONFIG)
    assert sees_the_future(model)
    assert all(m.bucketing.bidirectional for m in model.modules() if hasattr(m, "bucketing"))


def test_a_direction_changed_afterwards_is_refused() -> None:
    model = retrofitted(LLAMA)
    with pytest.raises(AttentionImplementationError, match="is_causal=False: the tables of this retrofit are causal"):
        model(tokens(), is_causal=False)
    model.config.is_causal = False
    with pytest.raises(AttentionImplementationError, match="is_causal=False"):
        model(tokens())


def test_an_encoders_tables_do_not_load_into_a_decoder(tmp_path: Path) -> None:
    retrofitted(BY_NAME["bert"]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, is_decoder=True)
    with pytest.raises(ConfigError, match="are bidirectional, and this model's attention is causal"):
        rpb.load(tmp_path, AutoModelForCausalLM, config=config)


@pytest.mark.parametrize("name", ["llama", "bert", "bloom", "mpt", "falcon", "t5", "mixtral", "gpt_oss"])
def test_a_retrofits_live_config_builds_no_plain_model(name: str) -> None:
    """Refused when the model is built or, where experts keep their own setting, when it first runs."""
    case = BY_NAME[name]
    config = copy.deepcopy(retrofitted(case).config)
    with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\)"):
        getattr(transformers, case.model)(config)(tokens())


def test_a_model_that_shares_its_config_is_not_half_patched() -> None:
    first = build(BY_NAME["gpt_oss"])
    second = type(first)(first.config).eval()
    rpb.retrofit(first, CONFIG)
    with pytest.raises(ValueError, match="give every other model a config of its own"):
        second(tokens())


def cast(model: Any) -> None:
    model.bfloat16().float()


def half(model: Any) -> None:
    model.half()


def through_data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.add_(1)


def merged_adapter(model: Any) -> None:
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).merge_and_unload()


def replaced(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.data + 1)


def resized(model: Any) -> None:
    model.resize_token_embeddings(70)


@pytest.mark.parametrize("change", [cast, half, through_data, merged_adapter, replaced, resized])
def test_revert_notices_every_change(change: Callable[[Any], None]) -> None:
    model = retrofitted(LLAMA)
    change(model)
    with pytest.raises(RevertError, match="parameters changed since the retrofit"):
        rpb.revert(model)


def test_what_a_config_had_comes_back() -> None:
    model = build(LLAMA)
    model.config.auto_map = {"AutoConfig": "own.Config"}
    with pytest.raises(ConfigError):
        rpb.retrofit(model, rpb.RetrofitConfig(init="zeros", relative_attention_num_buckets=1))
    assert model.config.auto_map == {"AutoConfig": "own.Config"}
    assert not hasattr(model.config, "rpb_retrofit")
    rpb.retrofit(model, CONFIG)
    rpb.revert(model)
    assert model.config.auto_map == {"AutoConfig": "own.Config"}


def test_shared_tables_trained_apart_by_peft(tmp_path: Path) -> None:
    """PEFT copies a shared table for every layer; what is merged and saved must be what was trained."""
    model = build(LLAMA)
    rpb.retrofit(model, SHARED)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["relative_attention_bias"])
    tuned = get_peft_model(rpb.load(tmp_path / "base"), lora)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(rpb.load(tmp_path / "base"), tmp_path / "adapter").merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        want = merged(tokens()).logits
        assert closeness(rpb.load(tmp_path / "merged").eval()(tokens()).logits, want) < 1e-6
        assert closeness(tuned.eval()(tokens()).logits, want) < 1e-4


@pytest.mark.parametrize("sizes", [("50GB", "20KB"), ("20KB", "50GB"), ("20KB", "40KB")])
def test_saving_again_in_another_number_of_shards(sizes: tuple[str, str], tmp_path: Path) -> None:
    model = retrofitted(LLAMA)
    model.save_pretrained(tmp_path, max_shard_size=sizes[0])
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path, max_shard_size=sizes[1])
    assert torch.equal(rpb.load(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_checkpoint_that_lost_weights_is_not_scored(tmp_path: Path) -> None:
    for folder, model in (("plain", build(LLAMA)), ("retrofit", retrofitted(LLAMA))):
        model.save_pretrained(tmp_path / folder)
        file = tmp_path / folder / "model.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if "up_proj" not in name}
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks 2 of its weights \(model.layers.0.mlp.up_proj.weight"):
            open_causal_lm(str(tmp_path / folder))


@torch.no_grad()
def test_a_graded_mask_keeps_its_grades() -> None:
    """Where the bias travels in the mask, what the mask already holds stays."""
    source, model = build(BY_NAME["falcon-rope"]), retrofitted(BY_NAME["falcon-rope"])
    ids = tokens(1)
    mask = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)[None, None]
    graded = mask.clone()
    graded[..., 3] += -3.0
    for m in (source, model):
        assert not torch.allclose(m(ids, attention_mask=graded).logits, m(ids, attention_mask=mask).logits)


def test_heads_take_their_settings(tmp_path: Path) -> None:
    retrofitted(LLAMA).save_pretrained(tmp_path)
    model = rpb.load(tmp_path, AutoModelForSequenceClassification, num_labels=3, dtype=torch.bfloat16)
    assert model.score.weight.shape[0] == model.config.num_labels == 3
