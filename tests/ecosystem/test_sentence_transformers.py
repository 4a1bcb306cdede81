"""Sentence Transformers, unmodified: a retrofit reads texts as long as its user wants, and goes on doing so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, ModernBertConfig, ModernBertModel

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.limits import NO_LIMIT
from tests.support.training_cases import PROSE, SIZE, run, small_tokenizer, write_retrofit

LONG = " ".join(PROSE.split()[:400])  # some thousand tokens, where the source has 128 positions


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As MiniLM comes: a BERT of 128 positions, whose settings cut texts at 64 tokens; and a layer behind it."""
    folder = tmp_path_factory.mktemp("sentences") / "source"
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZE, max_position_embeddings=128)).save_pretrained(folder / "bert")
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder / "bert")
    bert = Transformer(str(folder / "bert"))
    model = SentenceTransformer(modules=[bert, Pooling(64), Dense(64, 32), Normalize()], device="cpu")
    model.save(str(folder))
    settings = folder / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 64}))
    return folder


@pytest.fixture(scope="module")
def retrofit(source: Path) -> Path:
    return write_retrofit(source, source.parent / "retrofit")


def opened(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", local_files_only=True)


def seen(model: SentenceTransformer, text: str = LONG) -> int:
    """Tokens of a text that the model reads."""
    return model.preprocess([text])["input_ids"].shape[1]


def by_hand(folder: Path, source: Path, text: str = LONG) -> Tensor:
    """Its embedding, from the bare model: the mean of the last states, the layer behind it, normalised."""
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt", truncation=False)["input_ids"]
    with torch.no_grad():
        mean = rpb.load(folder)(ids).last_hidden_state[0].mean(0)
        dense = SentenceTransformer(str(source), device="cpu")[2]
        return torch.nn.functional.normalize(dense({"sentence_embedding": mean[None]})["sentence_embedding"][0], dim=0)


def test_no_text_is_cut(source: Path, retrofit: Path) -> None:
    assert seen(SentenceTransformer(str(source), device="cpu")) == 64
    model = opened(retrofit)
    assert type(model[0].auto_model).__name__ == "RpbBertModel"
    assert model.max_seq_length == NO_LIMIT and seen(model) > 1000
    assert AutoTokenizer.from_pretrained(retrofit).model_max_length == NO_LIMIT
    wanted = by_hand(retrofit, source)
    torch.testing.assert_close(torch.tensor(model.encode(LONG)), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [32, 1000])
def test_what_the_user_sets_is_kept(length: int, retrofit: Path, tmp_path: Path) -> None:
    model = opened(retrofit)
    model.max_seq_length = length
    model.save(str(tmp_path / "once"))
    again = opened(tmp_path / "once")
    again.save(str(tmp_path / "twice"))
    for reopened in (again, opened(tmp_path / "twice")):
        assert reopened.max_seq_length == length and seen(reopened) == length
        assert torch.equal(torch.tensor(reopened.encode(LONG)), torch.tensor(model.encode(LONG)))


def test_a_source_without_a_hard_limit_keeps_its_own(tmp_path: Path) -> None:
    """Rotations go on beyond the trained context: the settings stay, and another one is kept."""
    special = {"pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    ModernBertModel(ModernBertConfig(**SIZE, **special, max_position_embeddings=128)).save_pretrained(tmp_path / "bare")
    small_tokenizer().save_pretrained(tmp_path / "bare")
    SentenceTransformer(modules=[Transformer(str(tmp_path / "bare")), Pooling(64)], device="cpu").save(
        str(tmp_path / "source")
    )
    model = opened(write_retrofit(tmp_path / "source", tmp_path / "retrofit"))
    assert model.max_seq_length == 128
    model.max_seq_length = 500
    model.save(str(tmp_path / "saved"))
    assert opened(tmp_path / "saved").max_seq_length == 500


def test_a_fine_tuned_retrofit_is_still_one_of_sentences(retrofit: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PROSE)
    stages = [{"train": train, "tokens": 128, "lengths": {64: 1}} for train in ("tables", "all")]
    run(retrofit, tmp_path / "out", tmp_path / "text.txt", {"objective": "distillation", "stages": stages})
    model = opened(tmp_path / "out")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert model.max_seq_length == NO_LIMIT and seen(model) > 1000


def test_code_of_the_source_is_named(source: Path, tmp_path: Path) -> None:
    modules: list[dict[str, Any]] = json.loads((source / "modules.json").read_text())
    modules[1]["type"] = "custom.Pooling"
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    (folder / "modules.json").write_text(json.dumps(modules))
    report = retrofit_checkpoint(str(folder), tmp_path / "out", rpb.RetrofitConfig(init="normal")).report
    assert any(note.startswith("left behind") and "modules.json" in note for note in report.notes)
    assert not (tmp_path / "out" / "modules.json").exists()


def test_plain_loading_says_what_to_do(retrofit: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(retrofit), device="cpu")
