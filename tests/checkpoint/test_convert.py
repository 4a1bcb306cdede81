"""`rpb retrofit`: the checkpoint equals the model retrofitted in memory, and all that belongs to it travels."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.errors import CheckpointError, ConfigError, NotRetrofittedError, UnsupportedModelError
from rpb_retrofit.runtime import modeling
from tests.families.cases import BY_NAME, CASES
from tests.support.command import rpb_command
from tests.support.tiny_models import AUTO, CONFIG, build, inputs_of, tokens


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_in_memory(case: object, shard_size: str, tmp_path: Path) -> None:
    """Writing tables beside placed shards gives what retrofitting the loaded model gives, in one shard or many."""
    model = build(case)
    model.save_pretrained(tmp_path / "source", max_shard_size=shard_size)
    done = retrofit_checkpoint(str(tmp_path / "source"), tmp_path / "out", CONFIG)
    assert (done.shards > 2) == (shard_size == "20KB")
    report = rpb.retrofit(model, CONFIG)
    assert done.report == report
    loaded = rpb.load(tmp_path / "out").eval()
    inputs = inputs_of(case, tokens())
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in report.tables:
        with safe_open(tmp_path / "out" / index[name], "pt") as file:
            assert file.get_slice(name).get_shape() == [4, 8]


def test_a_checkpoint_saved_without_its_head(tmp_path: Path) -> None:
    """Shards whose names lack the base model's prefix still find their tables."""
    model = build(BY_NAME["gpt2"])
    model.transformer.save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text().replace("GPT2Model", "GPT2LMHeadModel"))
    retrofit_checkpoint(str(tmp_path / "source"), tmp_path / "out", CONFIG)
    loaded = rpb.load(tmp_path / "out").eval()
    rpb.retrofit(model, CONFIG)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_everything_travels(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert (
        rpb_command(monkeypatch, "retrofit", furnished, out, "--init", "zeros", "--json", tmp_path / "report.json") == 0
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (furnished / name).read_bytes()
    assert (out / "README.source.md").read_text() == "the source's card"
    assert not (out / "pytorch_model.bin").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)  # no remote code needed for it
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "a b!"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layers_expected"] == len(report["layers_patched"]) == 2
    assert rpb.load(out).config.rpb_retrofit["source"] == str(furnished)


def test_links_are_never_written_through(furnished: Path, tmp_path: Path) -> None:
    done = retrofit_checkpoint(str(furnished), tmp_path / "out", CONFIG, link=True)
    first = tmp_path / "out" / "model-00001-of-00002.safetensors"
    assert done.weights == "linked"
    assert first.samefile(furnished / "model.safetensors")
    before = (furnished / "model.safetensors").read_bytes()
    model = rpb.load(tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "out", max_shard_size="30KB")  # writes files of the same names
    assert (furnished / "model.safetensors").read_bytes() == before
    again = rpb.load(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_saving_over_an_index_leaves_one_truth(furnished: Path, tmp_path: Path) -> None:
    """A retrofit written in shards and saved again as one file must load what was saved last."""
    retrofit_checkpoint(str(furnished), tmp_path / "out", CONFIG)
    model = rpb.load(tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]
    assert torch.equal(rpb.load(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_a_hub_id(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is fetched by huggingface_hub, without pickles, and is what the retrofit calls its source."""
    asked: dict[str, object] = {}

    def snapshot(name: str, ignore_patterns: list[str]) -> str:
        asked.update(name=name, ignore=ignore_patterns)
        return str(furnished)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    retrofit_checkpoint("someone/llama", tmp_path / "out", CONFIG)
    assert asked["name"] == "someone/llama"
    assert "*.bin" in asked["ignore"]
    assert "*.safetensors" not in asked["ignore"]
    assert rpb.load(tmp_path / "out").config.rpb_retrofit["source"] == "someone/llama"


def test_an_out_that_exists_is_kept(furnished: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        retrofit_checkpoint(str(furnished), tmp_path / "out", CONFIG)
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_table_whose_heads_do_not_match(furnished: Path, tmp_path: Path) -> None:
    retrofit_checkpoint(str(furnished), tmp_path / "out", CONFIG)
    file = tmp_path / "out" / "model-00002-of-00002.safetensors"
    tables = load_file(file)
    name = sorted(tables)[1]
    tables[name] = torch.zeros(3, 8)
    save_file(tables, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as refused:
        rpb.load(tmp_path / "out")
    assert f"{name} has shape (3, 8) (heads, buckets), the config asks for (4, 8)" in str(refused.value)


def test_the_runtime_travels_whole() -> None:
    folder = Path(modeling.__file__).parent
    assert sorted(modeling.RUNTIME_FILES) == sorted(p.name for p in folder.glob("*.py") if p.name != "__init__.py")


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown config key 'num_buckets'.*relative_attention_num_buckets"):
        rpb.RetrofitConfig.from_dict({"num_buckets": 8})


def test_loading_something_else(furnished: Path) -> None:
    with pytest.raises(NotRetrofittedError, match="is not a retrofit: make one with `rpb retrofit"):
        rpb.load(furnished)
    auto = getattr(transformers, AUTO["seq2seq"])
    shutil.copytree(furnished, furnished.parent / "copy")
    retrofit_checkpoint(str(furnished), furnished.parent / "out", CONFIG)
    with pytest.raises(UnsupportedModelError, match="AutoModelForSeq2SeqLM has no class"):
        rpb.load(furnished.parent / "out", auto)
