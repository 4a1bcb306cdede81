"""Damaged and hostile sources: each is refused in one line, before anything is made of it."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.load import open_model
from rpb_retrofit.errors import CheckpointError, ConfigError, MissingTablesError, RetrofitError
from tests.checkpoint.test_checkpoint import edit_config, rpb_command
from tests.families.cases import BY_NAME, CASES
from tests.support.tiny_models import CONFIG, build, retrofitted, tokens

UP = "model.layers.0.mlp.up_proj.weight"


def write_source(folder: Path, case: str = "llama") -> Path:
    """A tiny checkpoint with a tokenizer."""
    build(BY_NAME[case]).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command answers wrong input with."""
    capsys.readouterr()
    assert rpb_command(monkeypatch, *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpb: ")]
    assert len(said) == 1
    return said[0]


# --- what the headers must hold ----------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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


# --- a retrofit that lost something ------------------------------------------------------------------------------


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


# --- what is no number -------------------------------------------------------------------------------------------


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


# --- GGUF --------------------------------------------------------------------------------------------------------


def write_gguf(file: Path, without: str = "") -> Path:
    """A tiny llama of one layer."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", b"\xe2\x96\x81a"])
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0])
    writer.add_token_types([2, 3, 3, 1])
    for name, value in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(value)
    shapes = {"token_embd": (4, 32), "output": (4, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_without_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_gguf(tmp_path / "whole.gguf")
    retrofit_checkpoint(str(whole), tmp_path / "out", CONFIG)
    assert rpb.load(tmp_path / "out").config.num_hidden_layers == 1
    file = write_gguf(tmp_path / "model.gguf", without="blk.0.ffn_up")
    for arguments in (("retrofit", file, tmp_path / "no", "--init", "zeros"), ("evaluate", file)):
        said = refusal(monkeypatch, capsys, *arguments)
        assert "lacks 1 of its weights (model.layers.0.mlp.up_proj.weight)" in said
    assert not (tmp_path / "no").exists()


def test_what_lies_beside_a_gguf_file_is_not_read(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    os.mkfifo(tmp_path / "generation_config.json")
    retrofit_checkpoint(str(file), tmp_path / "out", CONFIG)
    assert rpb.load(tmp_path / "out").config.rpb_retrofit["source"] == str(file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.99])
def test_a_gguf_file_that_is_cut(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    for arguments in (("retrofit", tmp_path / "cut.gguf", tmp_path / "out", "--init", "zeros"),):
        assert "cut.gguf' cannot be read as GGUF" in refusal(monkeypatch, capsys, *arguments)


# --- configs, names and files ------------------------------------------------------------------------------------


def deep(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 100_000 + "]" * 100_000)


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def indexed(folder: Path, name: str) -> None:
    """The weights under another name, in an index."""
    target = folder / name
    if not target.exists():
        (folder / "model.safetensors").rename(target)
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = load_file(target) if name.endswith(".safetensors") else ["a"]
    index = {"weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def outside(folder: Path, name: str) -> None:
    """A file moved out of the folder, with a link in its place."""
    target = folder.parent / f"{folder.name}.moved"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def unreadable_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda s: edit_config(s, rope_parameters={"rope_type": "banana", "rope_theta": 1e4}), "banana"),
        (lambda s: edit_config(s, hidden_act="banana"), "banana"),
        (lambda s: edit_config(s, num_attention_heads=0), "num_attention_heads=0"),
        (lambda s: edit_config(s, num_attention_heads=-4), "num_attention_heads=-4"),
        (lambda s: edit_config(s, num_attention_heads="four"), "num_attention_heads='four'"),
        (lambda s: edit_config(s, num_attention_heads=3), "number of attention heads (3)"),
        (lambda s: edit_config(s, num_key_value_heads=3), "has shape"),
        (lambda s: edit_config(s, num_hidden_layers=10**12), "num_hidden_layers=1000000000000"),
        (lambda s: edit_config(s, hidden_size=10**30), "hidden_size=1000000000000000000000000000000"),
        (lambda s: edit_config(s, vocab_size=10**12), "has shape"),
        (lambda s: edit_config(s, max_position_embeddings=-5), "max_position_embeddings=-5"),
        (lambda s: edit_config(s, max_position_embeddings=1.5), "max_position_embeddings=1.5"),
        (lambda s: edit_config(s, transformers_weights="other.safetensors"), "transformers_weights"),
        (lambda s: deep(s, "config.json"), "is nested too deeply"),
        (lambda s: (deep(s, "model.safetensors.index.json"), (s / "model.safetensors").unlink()), "nested too deeply"),
        (lambda s: (s / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda s: pipe(s, "config.json"), "config.json is a pipe"),
        (lambda s: pipe(s, "model.safetensors"), "model.safetensors is a pipe"),
        (lambda s: pipe(s, "tokenizer.json"), "tokenizer.json is a pipe"),
        (lambda s: outside(s, "config.json"), "config.json is a link to"),
        (lambda s: outside(s, "model.safetensors"), "model.safetensors is a link to"),
        (lambda s: outside(s, "tokenizer.json"), "tokenizer.json is a link to"),
        (lambda s: (s / "more").symlink_to("/etc"), "more is a link to '/etc'"),
        (lambda s: (s / "notes.txt").symlink_to("nowhere"), "notes.txt is a link to nothing"),
        (lambda s: indexed(s, "../x.safetensors"), "names '../x.safetensors'"),
        (lambda s: indexed(s, str(s.parent / "x.safetensors")), "x.safetensors', which is no safetensors file of this"),
        (lambda s: indexed(s, "x.bin"), "names 'x.bin', which is no safetensors file"),
        (lambda s: (s / "shard-00000-model-00000-of-00001.safetensors").touch(), "holds a distributed checkpoint"),
        (lambda s: (s / "loop").symlink_to("loop"), "cannot be read"),
        (lambda s: (s / "generation_config.json").write_text("[1]"), "generation_config.json"),
        (lambda s: (s / "generation_config.json").write_text("[" * 100_000), "generation_config.json"),
        (lambda s: edit_config(s, dtype="banana"), "banana"),
        (lambda s: (s / "model.safetensors").rename(s / "PYTORCH_MODEL.BIN"), "as pickle only (PYTORCH_MODEL.BIN)"),
    ],
)
@pytest.mark.parametrize("command", ["retrofit", "evaluate"])
def test_a_source_that_cannot_be_used(
    damage: Callable[[Path], object],
    answer: str,
    command: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(source)
    before = sorted(path.name for path in tmp_path.iterdir())
    more: list[object] = [tmp_path / "out", "--init", "zeros"] if command == "retrofit" else ["--lengths", "32"]
    assert answer in refusal(monkeypatch, capsys, command, source, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "file"),
    [
        ("[]", "tokenizer.json"),
        ("[" * 100_000, "tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "tokenizer.json"),
        ("[1]", "tokenizer_config.json"),
        ("[" * 100_000, "tokenizer_config.json"),
        ('{"tokenizer_class": 5}', "tokenizer_config.json"),
    ],
)
def test_odd_tokenizer_files(
    content: str,
    file: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source / file).write_text(content)
    for arguments in (("retrofit", source, tmp_path / "out"), ("evaluate", source)):
        assert "no tokenizer that Transformers can read" in refusal(monkeypatch, capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("x" * 5000, "(5000 characters)"),
        ("./" + "x" * 5000, "(5000 characters)"),
        ("x" * 5000 + ".gguf", "(5005 characters)"),
        ("~nosuchuser/model", "'~nosuchuser/model': no such user"),
        ("~nosuchuser/model.gguf", "'~nosuchuser/model.gguf': no such user"),
        ("a\0b", "no such"),
    ],
    ids=lambda value: value[:12],
)
def test_names_of_no_source(
    name: str,
    answer: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (
        ("retrofit", name, tmp_path / "out", "--init", "zeros"),
        ("retrofit", source, tmp_path / "out", "--init", f"from:{name}"),
        ("evaluate", name),
    ):
        if arguments[-1] != f"from:{name}" or not name.endswith(".gguf"):
            said = refusal(monkeypatch, capsys, *arguments)
            assert answer in said and len(said) < 1000
    assert "no such user" in refusal(monkeypatch, capsys, "retrofit", source, "~nosuchuser/out", "--init", "zeros")
    with pytest.raises(CheckpointError):
        rpb.load(name if len(name) > 20 else "~nosuchuser")


@pytest.mark.parametrize("hidden", ["source", "more"])
def test_a_folder_that_may_not_be_read(
    hidden: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's refusal is played, since a test that runs as root may read everything."""
    (source / "more").mkdir()

    def refusing(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def listing(path: Any = ".") -> Any:
            if Path(path).name == hidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        return listing

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    for arguments in (("retrofit", source, tmp_path / "out", "--init", "zeros"), ("evaluate", source)):
        assert f"{hidden}' cannot be read: Permission denied" in refusal(monkeypatch, capsys, *arguments)
