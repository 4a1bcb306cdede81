"""GGUF files: whole, without a tensor, cut, and what lies beside them."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from tests.support.command import refusal
from tests.support.tiny_models import CONFIG


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
        message = refusal(monkeypatch, capsys, *arguments)
        assert "lacks 1 of its weights (model.layers.0.mlp.up_proj.weight)" in message
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
