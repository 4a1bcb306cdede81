"""NaN and infinity in weights, attention and tables are refused by name, also where nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.errors import CheckpointError, ConfigError, RetrofitError
from tests.families.cases import BY_NAME
from tests.support.sources import UP, write_source
from tests.support.tiny_models import build, retrofitted, tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_source_with_what_is_no_number(value: float, tmp_path: Path) -> None:
    model = build(BY_NAME["llama"])
    with torch.no_grad():
        model.get_parameter(UP)[1, 2] = value
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"1 of its weights hold NaN or infinity \(model.layers.0.mlp.up_proj"):
        rpb.retrofit(model, rpb.RetrofitConfig(), calibration=[tokens(1, 64)])
    assert all(torch.equal(before[n].nan_to_num(), p.nan_to_num()) for n, p in model.named_parameters())
    model.save_pretrained(write_source(tmp_path / "source"))
    with pytest.raises(CheckpointError, match="hold NaN or infinity"):
        retrofit_checkpoint(str(tmp_path / "source"), tmp_path / "out", rpb.RetrofitConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("link", [False, True])
def test_weights_that_are_not_loaded_are_looked_at(dtype: torch.dtype, link: bool, tmp_path: Path) -> None:
    """Without text nothing is loaded, and a number that is none would travel; what the model has no use for may."""
    model = build(BY_NAME["llama"]).to(dtype)
    model.save_pretrained(write_source(tmp_path / "source"))
    file, config = tmp_path / "source" / "model.safetensors", rpb.RetrofitConfig(init="zeros")
    tensors = load_file(file)
    save_file({**tensors, "spare": torch.full((3,), torch.nan, dtype=dtype)}, file, metadata={"format": "pt"})
    retrofit_checkpoint(str(tmp_path / "source"), tmp_path / "out", config, link=link)
    tensors[UP][1, 2] = -torch.inf
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of its weights hold NaN or infinity \(model.layers.0.mlp.up_proj"):
        retrofit_checkpoint(str(tmp_path / "source"), tmp_path / "again", config, link=link)
    assert not (tmp_path / "again").exists()


def test_scores_that_overflow_are_not_fitted() -> None:
    """Weights that are numbers, and attention that is none."""
    model = build(BY_NAME["llama"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.fill_(1e30)
            layer.self_attn.k_proj.weight.fill_(1e30)
    with pytest.raises(RetrofitError, match="not finite"):
        rpb.retrofit(model, rpb.RetrofitConfig(), calibration=[tokens(1, 64)])
    assert not hasattr(model.config, "rpb_retrofit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tables_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    model = retrofitted(BY_NAME["llama"])
    with torch.no_grad():
        model.model.layers[1].self_attn.relative_attention_bias.weight[0, 3] = value
    model.save_pretrained(tmp_path / "retrofit")
    name = "model.layers.1.self_attn.relative_attention_bias.weight"
    with pytest.raises(ConfigError, match=f"{name} holds NaN or infinity"):
        rpb.load(tmp_path / "retrofit")
    with pytest.raises(ConfigError, match=f"{name} holds NaN or infinity"):
        rpb.retrofit(build(BY_NAME["llama"]), rpb.RetrofitConfig(init=f"from:{tmp_path / 'retrofit'}"))
    t5 = build(BY_NAME["t5"])
    with torch.no_grad():
        t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight[3, 0] = value
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"relative_attention_bias\.weight holds NaN or infinity"):
        rpb.retrofit(build(BY_NAME["llama"]), rpb.RetrofitConfig(init=f"from:{tmp_path / 't5'}"))
