"""A reader that does not understand what a checkpoint's config says of its retrofit refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.errors import CheckpointError, ConfigError, RetrofitError
from tests.families.cases import BY_NAME
from tests.support.command import rpb_command
from tests.support.tiny_models import CONFIG, build, retrofitted

FIRST, SECOND = (f"model.layers.{i}.self_attn.relative_attention_bias" for i in (0, 1))


def change(folder: Path, **settings: Any) -> None:
    """Write other settings; None: without."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rpb_retrofit"] = {k: v for k, v in {**config["rpb_retrofit"], **settings}.items() if v is not None}
    file.write_text(json.dumps(config))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"version": "99.0"}, "written by rpb_retrofit 99.0, is newer than what reads it, rpb_retrofit 0"),
    ({"version": "banana"}, "rpb_retrofit.version='banana'"),
    ({"version": 5}, "rpb_retrofit.version=5"),
    ({"version": None}, "rpb_retrofit.version=None"),
    ({"banana": 1}, "written by rpb_retrofit 0.1.0, has the setting 'banana', which rpb_retrofit 0.1.0 does not know"),
    ({"shared": None}, "lacks the setting 'shared'"),
    ({"shared": 1}, "has shared=1 in its config.json: expected true or false"),
    ({"tail": "cubic"}, "has tail='cubic' in its config.json: expected 'flat' or 'log'"),
    ({"tail": True}, "tail=True"),
    ({"scale": "large"}, "scale='large'"),
    ({"scale": [1]}, "scale=[1]"),
    ({"calibrate": "all"}, "calibrate='all'"),
    ({"kept_frequencies": 2.5}, "kept_frequencies=2.5"),
    ({"kept_frequencies": {"inv_freq": 2.5}}, "kept_frequencies={'inv_freq': 2.5}"),
    ({"kept_frequencies": {"inv_freq": -1}}, "kept_frequencies={'inv_freq': -1}"),
    (
        {"kept_frequencies": {"inv_freq": 99}},
        "kept_frequencies inv_freq=99 in its config.json, but the model has 4 frequencies",
    ),
    ({"kept_frequencies": {"banana": 1}}, "but the model has no rotary buffer of that name"),
    ({"keep_frequencies": -1}, "keep_frequencies=-1"),
    ({"kept_in_layers": 2}, "kept_in_layers=2 in its config.json: expected a list of whole numbers"),
    ({"kept_in_layers": [1, -1]}, "kept_in_layers=[1, -1]"),
    ({"kept_in_layers": [1]}, "kept_in_layers in its config.json has 1 numbers, but the model has 2 layers"),
    (
        {"kept_frequencies": {"inv_freq": 2}, "kept_in_layers": [1, 3]},
        "kept_in_layers in its config.json keeps 3 frequencies in layer 1, but kept_frequencies keep 2",
    ),
    ({"kept_in_layers": [0, 1]}, "keeps 1 frequencies in layer 1, but kept_frequencies keep 0"),
    ({"relative_attention_num_buckets": 8.0}, "relative_attention_num_buckets=8.0"),
    ({"relative_attention_num_buckets": True}, "relative_attention_num_buckets=True"),
    ({"relative_attention_num_buckets": 1}, "relative_attention_num_buckets=1"),
    ({"relative_attention_max_distance": -3}, "relative_attention_max_distance=-3"),
    ({"bidirectional": []}, "bidirectional=[]"),
    ({"bidirectional": "no"}, "bidirectional='no'"),
    ({"text_lengths": [[1]]}, "text_lengths=[[1]]"),
    ({"mechanism": "learned"}, "mechanism='learned' in its config.json, but the model's is rope"),
    ({"relative_content_factor": {"layout": "round"}}, "relative_content_factor={'layout': 'round'}"),
    ({"shared": True}, f"shared=true in its config.json, but it holds {SECOND}.weight beside the shared table"),
]


@pytest.mark.parametrize(("settings", "answer"), SETTINGS, ids=lambda value: str(value)[:40])
def test_settings_without_a_meaning(
    settings: dict[str, Any],
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By every way of loading: this package's, the class's own, a command's, and as the source of tables."""
    model = retrofitted(BY_NAME["llama"])
    model.save_pretrained(tmp_path / "retrofit")
    change(tmp_path / "retrofit", **settings)
    with pytest.raises(ConfigError) as refused:
        rpb.load(tmp_path / "retrofit")
    assert answer in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ConfigError):
        type(model).from_pretrained(tmp_path / "retrofit")
    with pytest.raises(ConfigError):
        rpb.retrofit(build(BY_NAME["llama"]), rpb.RetrofitConfig(init=f"from:{tmp_path / 'retrofit'}"))
    if answer.startswith(("written", "has", "lacks", "rpb_retrofit")):  # what needs no model to be seen
        assert rpb_command(monkeypatch, "card", tmp_path / "retrofit") == 2
        assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{}, {"tail": None, "scale": None, "calibrate": None, "polish": None, "seed": None}]
)
def test_settings_of_older_versions(settings: dict[str, Any], tmp_path: Path) -> None:
    retrofitted(BY_NAME["llama"]).save_pretrained(tmp_path)
    change(tmp_path, **settings)
    rpb.load(tmp_path)


@pytest.mark.parametrize("value", ["banana", [1], None, 5])
def test_settings_that_are_none(value: Any, tmp_path: Path) -> None:
    retrofitted(BY_NAME["llama"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rpb_retrofit": value}))
    with pytest.raises(RetrofitError):
        rpb.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "answer"),
    [
        ({f"{FIRST}.tail": torch.zeros(4, 1)}, f"holds {FIRST}.tail, which the settings in its config.json do not ask"),
        (
            {"model.layers.0.self_attn.relative_content_factor.weight": torch.zeros(4, 4, 2)},
            "holds model.layers.0.self_attn.relative_content_factor.weight",
        ),
        (
            {"model.layers.2.self_attn.relative_attention_bias.weight": torch.zeros(4, 8)},
            "holds model.layers.2.self_attn.relative_attention_bias.weight",
        ),
    ],
    ids=["tail", "factor", "layer"],
)
def test_tensors_that_no_setting_asks_for(tensors: dict[str, torch.Tensor], answer: str, tmp_path: Path) -> None:
    retrofitted(BY_NAME["llama"]).save_pretrained(tmp_path)
    change_tensors(tmp_path, **tensors)
    with pytest.raises(ConfigError) as refused:
        rpb.load(tmp_path)
    assert answer in str(refused.value)
    with pytest.raises(ConfigError):
        rpb.retrofit(build(BY_NAME["llama"]), rpb.RetrofitConfig(init=f"from:{tmp_path}"))


@pytest.mark.parametrize(("name", "head"), [("bert", "BertModel"), ("llama", "LlamaModel"), ("t5", "T5EncoderModel")])
def test_a_head_that_has_not_all_layers_still_loads(name: str, head: str, tmp_path: Path) -> None:
    retrofitted(BY_NAME[name]).save_pretrained(tmp_path)
    rpb.load(tmp_path, getattr(transformers, head))


def test_a_head_whose_embeddings_transformers_would_draw(tmp_path: Path) -> None:
    """BartForCausalLM looks for the embeddings under a name that its seq2seq model does not store."""
    retrofitted(BY_NAME["bart"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 2 of its weights \(lm_head.weight, \.\.\.\)"):
        rpb.load(tmp_path, transformers.BartForCausalLM)


def test_a_shared_table_is_one(tmp_path: Path) -> None:
    model = build(BY_NAME["llama"])
    rpb.retrofit(model, rpb.RetrofitConfig(init="normal", shared=True))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    rpb.load(tmp_path)


def test_the_travelling_code_refuses_too(tmp_path: Path) -> None:
    """Where rpb_retrofit is not asked, the checkpoint's own code reads the settings."""
    model = build(BY_NAME["llama"])
    rpb.retrofit(model, CONFIG)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    change(tmp_path, version="99.0")
    with pytest.raises(ValueError, match=r"written by rpb_retrofit 99\.0, is newer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_one_version() -> None:
    from rpb_retrofit.runtime.version import __version__

    assert rpb.__version__ == __version__


@pytest.mark.parametrize("architectures", [{"RpbLlamaForCausalLM": 0}, 5, "RpbLlamaForCausalLM", [5], [], None])
def test_architectures_that_are_no_list_of_names(tmp_path: Path, architectures: Any) -> None:
    retrofitted(BY_NAME["llama"]).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(RetrofitError, match="architecture 'none' is not a class of Transformers"):
        rpb.load(tmp_path / "out")
