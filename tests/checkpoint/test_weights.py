"""Weights that are not what a config or a retrofit needs are refused in one line, before anything is made of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.load import open_model
from rpb_retrofit.errors import CheckpointError, MissingTablesError
from tests.families.cases import BY_NAME, CASES
from tests.support.command import refusal
from tests.support.sources import UP, change_tensors, edit_config
from tests.support.tiny_models import CONFIG, build, retrofitted


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write another header before the same bytes."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def one_missing(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(UP))


def another_shape(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({UP: torch.zeros(47, 32)}))


def integers(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({UP: torch.zeros(48, 32, dtype=torch.int32)}))


def a_lying_shape(folder: Path) -> None:
    change_header(folder, lambda header: header[UP].update(shape=[32, 48]))


def a_shape_of_another_size(folder: Path) -> None:
    change_header(folder, lambda header: header[UP].update(shape=[48, 31]))


def a_lying_dtype(folder: Path) -> None:
    change_header(folder, lambda header: header[UP].update(dtype="F16"))


def integers_of_that_size(folder: Path) -> None:
    change_header(folder, lambda header: header[UP].update(dtype="I32"))


def an_unknown_dtype(folder: Path) -> None:
    change_header(folder, lambda header: header[UP].update(dtype="banana"))


def trailing_bytes(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 64)


def one_layer_too_many(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)


def layers_without_end(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=9_999)


def a_deep_header(folder: Path) -> None:
    text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


HEADERS = [
    (one_missing, f"lacks 1 of its weights ({UP})"),
    (another_shape, f"{UP} has shape (47, 32), its config.json asks for (48, 32)"),
    (integers, f"{UP} is stored as I32"),
    (a_lying_shape, f"{UP} has shape (32, 48), its config.json asks for (48, 32)"),
    (a_shape_of_another_size, "is not a safetensors file"),
    (a_lying_dtype, "is not a safetensors file"),
    (integers_of_that_size, f"{UP} is stored as I32"),
    (an_unknown_dtype, "is not a safetensors file"),
    (trailing_bytes, "is not a safetensors file"),
    (one_layer_too_many, "model.layers.2."),
    (layers_without_end, "its config.json has num_hidden_layers=9999, but its weights are"),
    (a_deep_header, "is not a safetensors file"),
]


@pytest.mark.parametrize("command", ["zeros", "calibrated", "evaluate", "from"])
@pytest.mark.parametrize(("damage", "answer"), HEADERS, ids=lambda value: getattr(value, "__name__", ""))
def test_weights_that_are_not_the_configs(
    damage: Callable[[Path], None],
    answer: str,
    command: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "from":
        retrofitted(BY_NAME["llama"]).save_pretrained(source)
    damage(source)
    build(BY_NAME["llama"]).save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    arguments: dict[str, list[object]] = {
        "zeros": ["retrofit", source, out, "--init", "zeros"],
        "calibrated": ["retrofit", source, out],
        "evaluate": ["evaluate", source, "--lengths", "32"],
        "from": ["retrofit", tmp_path / "other", out, "--init", f"from:{source}"],
    }
    assert answer in refusal(monkeypatch, capsys, *arguments[command])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_knows_its_tensors(case: object, tmp_path: Path) -> None:
    """In shards as they are stored, under whatever names: each missing tensor is noticed."""
    build(case).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    lost = sorted(name for name in tensors if ".1." in name and name.endswith("weight"))[0]
    save_file({k: v for k, v in tensors.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of its weights|make no|has shape"):
        retrofit_checkpoint(str(tmp_path / "source"), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["finetune", "diagnose", "compare"])
def test_other_commands_notice_a_missing_tensor(
    command: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    retrofit_checkpoint(str(source), tmp_path / "retrofit", CONFIG)
    one_missing(source)
    text = tmp_path / "text.txt"
    text.write_text("a b " * 4000)
    out = tmp_path / "out"
    arguments: dict[str, list[object]] = {
        "finetune": ["finetune", tmp_path / "retrofit", out, "--data", text, "--source", source],
        "diagnose": ["diagnose", tmp_path / "retrofit", "--source", source, "--data", text, "--out", out],
        "compare": ["compare", source, "--data", text, "--out", out],
    }
    if command == "finetune":
        arguments[command] = arguments[command][:-2]
    assert f"lacks 1 of its weights ({UP})" in refusal(monkeypatch, capsys, *arguments[command])


def test_unused_tensors_are_named(source: Path, tmp_path: Path) -> None:
    change_tensors(source, lambda tensors: tensors.update({"model.mtp.weight": torch.zeros(2)}))
    done = retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    assert done.report.notes == ["1 tensors that RpbLlamaForCausalLM has no use for travel along: model.mtp.weight"]


def test_tensors_named_as_a_retrofits_own_make_way(source: Path, tmp_path: Path) -> None:
    """A plain model has no use for them; beside the retrofit's tables they would keep it from loading."""
    stray = "model.layers.0.self_attn.relative_attention_bias"
    change_tensors(source, lambda t: t.update({f"{stray}.tail": torch.ones(4, 1), f"{stray}.weight": torch.ones(2)}))
    retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    assert not rpb.load(tmp_path / "out").get_parameter(f"{stray}.weight").any()


def drop(folder: Path, ending: str) -> None:
    for file in folder.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(ending)}
        save_file(kept, file, metadata={"format": "pt"})


def test_a_retrofit_without_a_weight_is_not_loaded(tmp_path: Path) -> None:
    """With any head: only what that head adds may begin at random."""
    retrofitted(BY_NAME["llama"]).save_pretrained(tmp_path)
    loaded = rpb.load(tmp_path, AutoModelForSequenceClassification)
    assert loaded.score.weight.isfinite().all()
    drop(tmp_path, "layers.1.mlp.up_proj.weight")
    for head in (None, AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"lacks 1 of its weights \(model.layers.1.mlp.up_proj.weight\)"):
            rpb.load(tmp_path, head)


def test_an_adapter_beside_a_retrofit_is_refused(tmp_path: Path) -> None:
    """Its loading report would replace the model's, and so hide the tables that are missing."""
    model = retrofitted(BY_NAME["llama"])
    model.save_pretrained(tmp_path)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    drop(tmp_path, "relative_attention_bias.weight")
    for opened in (rpb.load, type(model).from_pretrained, lambda path: open_model(str(path))):
        with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config.json\)"):
            opened(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(MissingTablesError):
        rpb.load(tmp_path)


def test_an_adapter_beside_a_plain_model_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get_peft_model(build(BY_NAME["llama"]), LoraConfig(target_modules=["q_proj"])).save_pretrained(source)
    assert "holds an adapter" in refusal(monkeypatch, capsys, "evaluate", source)
