"""`rpb retrofit`: what travels, what stays whole when it is interrupted, and what wrong input is answered with."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.cli import main
from rpb_retrofit.errors import CheckpointError, ConfigError, NotRetrofittedError, UnsupportedModelError
from rpb_retrofit.runtime import modeling
from tests.families.cases import BY_NAME, CASES
from tests.support.tiny_models import AUTO, CONFIG, build, inputs_of, tokens

RPB = [sys.executable, "-c", "from rpb_retrofit.cli import main; main()"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny llama with all that may lie beside a model."""
    folder = tmp_path / "source"
    build(BY_NAME["llama"]).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    wrapped.chat_template = "{{ messages[0]['content'] }}!"
    wrapped.save_pretrained(folder)
    (folder / "README.md").write_text("the source's card")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("pickle")
    return folder


def rpb_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["rpb", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


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


def test_everything_travels(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert rpb_command(monkeypatch, "retrofit", source, out, "--init", "zeros", "--json", tmp_path / "report.json") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "README.source.md").read_text() == "the source's card"
    assert not (out / "pytorch_model.bin").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)  # no remote code needed for it
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "a b!"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layers_expected"] == len(report["layers_patched"]) == 2
    assert rpb.load(out).config.rpb_retrofit["source"] == str(source)


def test_links_are_never_written_through(source: Path, tmp_path: Path) -> None:
    done = retrofit_checkpoint(str(source), tmp_path / "out", CONFIG, link=True)
    first = tmp_path / "out" / "model-00001-of-00002.safetensors"
    assert done.weights == "linked"
    assert first.samefile(source / "model.safetensors")
    before = (source / "model.safetensors").read_bytes()
    model = rpb.load(tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "out", max_shard_size="30KB")  # writes files of the same names
    assert (source / "model.safetensors").read_bytes() == before
    again = rpb.load(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_saving_over_an_index_leaves_one_truth(source: Path, tmp_path: Path) -> None:
    """A retrofit written in shards and saved again as one file must load what was saved last."""
    retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    model = rpb.load(tmp_path / "out")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]
    assert torch.equal(rpb.load(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_kill_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """kill -9 while the weights are written: no OUT; the next run sweeps up and succeeds."""
    big = {f"filler.{i}": torch.zeros(16 << 20) for i in range(8)}
    save_file(big | load_file(source / "model.safetensors"), source / "model.safetensors", metadata={"format": "pt"})
    del big
    process = subprocess.Popen(
        [*RPB, "retrofit", source, tmp_path / "out", "--init", "zeros"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/model-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".out.partial-*"))
    assert not (tmp_path / "out").exists()
    retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    assert not list(tmp_path.glob(".out.partial-*"))
    rpb.load(tmp_path / "out")


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, limit: int) -> None:
    """A limit on file sizes stands for the disk: first the config, then the weights do not fit."""
    command = [*RPB, "retrofit", str(source), str(tmp_path / "out"), "--init", "zeros"]

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, preexec_fn=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"rpb: writing '{tmp_path / 'out'}' failed: File too large; nothing was left behind")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def mamba(folder: Path) -> None:
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_weights(folder: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def half_a_shard(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')


def config_is_a_folder(folder: Path) -> None:
    no_config(folder)
    (folder / "config.json").mkdir()


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def odd_model_type(folder: Path) -> None:
    edit_config(folder, model_type=[1])


def odd_architectures(folder: Path) -> None:
    edit_config(folder, architectures=[5])


def odd_retrofit(folder: Path) -> None:
    edit_config(folder, rpb_retrofit=True)


def odd_quantisation(folder: Path) -> None:
    edit_config(folder, quantization_config="int3")


def odd_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')


def odd_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def empty_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def gptq(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def retrofitted_already(folder: Path) -> None:
    edit_config(folder, rpb_retrofit={"source": "somewhere"})


def own_code(folder: Path) -> None:
    edit_config(folder, architectures=["MyLlama"])


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "options", "answer"),
    [
        (no_config, [], "has no config.json"),
        (broken_config, [], "is not JSON"),
        (mamba, [], "model type 'mamba' has no positional mechanism that this toolkit replaces"),
        (pickle_only, [], "as pickle only (pytorch_model.bin)"),
        (no_weights, [], "has no model.safetensors"),
        (truncated, [], "is not a safetensors file"),
        (half_a_shard, [], "is shorter than its header says"),
        (missing_shard, [], "lacks 1 of 1 shards: x.safetensors"),
        (gptq, [], "is quantised (gptq)"),
        (retrofitted_already, [], "is a retrofit already (of 'somewhere')"),
        (own_code, [], "architecture 'MyLlama' is not a class of Transformers"),
        (config_is_a_folder, [], "config.json' cannot be read: Is a directory"),
        (config_is_a_list, [], "is not a JSON object"),
        (odd_model_type, [], "its config.json names no model_type"),
        (odd_architectures, [], "architecture '5' is not a class of Transformers"),
        (odd_retrofit, [], "is a retrofit already"),
        (odd_quantisation, [], "is quantised (int3)"),
        (odd_index, [], "has no weight_map"),
        (odd_header, [], "is not a safetensors file"),
        (empty_header, [], "is not a safetensors file"),
        (adapter, [], "holds an adapter"),
        (nothing, ["--max-distance", str(10**30)], "it can be 16777216 at most"),
        (nothing, ["--json", "/nowhere/report.json"], "--json '/nowhere/report.json' is a folder, or lies in none"),
        (nothing, ["--buckets", "1"], "relative_attention_num_buckets=1: a causal table needs at least 2"),
        (nothing, ["--max-distance", "16"], "relative_attention_max_distance=16"),
        (nothing, ["--init", "ones"], "init='ones': choose one of calibrated, zeros, normal, alibi"),
        (nothing, ["--bukets", "8"], "No such option: --bukets"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_wrong_input_gets_one_line(
    damage: Callable[[Path], None],
    options: list[str],
    answer: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(source)
    assert rpb_command(monkeypatch, "retrofit", source, tmp_path / "out", "--init", "zeros", *options) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpb: ")]
    assert len(message) == 1
    assert answer in message[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("./nowhere", "'./nowhere': no such folder"),
        ("nobody/nothing", "'nobody/nothing': no such folder, and the hub did not answer"),
        ("nothing.gguf", "'nothing.gguf': no such file"),
    ],
)
def test_no_such_source(
    name: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rpb_command(monkeypatch, "retrofit", name, tmp_path / "out", "--init", "zeros") == 2
    assert answer in capsys.readouterr().err


def test_a_hub_id(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is fetched by huggingface_hub, without pickles, and is what the retrofit calls its source."""
    asked: dict[str, object] = {}

    def snapshot(name: str, ignore_patterns: list[str]) -> str:
        asked.update(name=name, ignore=ignore_patterns)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    retrofit_checkpoint("someone/llama", tmp_path / "out", CONFIG)
    assert asked["name"] == "someone/llama"
    assert "*.bin" in asked["ignore"]
    assert "*.safetensors" not in asked["ignore"]
    assert rpb.load(tmp_path / "out").config.rpb_retrofit["source"] == "someone/llama"


def test_an_out_that_exists_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_a_table_whose_heads_do_not_match(source: Path, tmp_path: Path) -> None:
    retrofit_checkpoint(str(source), tmp_path / "out", CONFIG)
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


def test_loading_something_else(source: Path) -> None:
    with pytest.raises(NotRetrofittedError, match="is not a retrofit: make one with `rpb retrofit"):
        rpb.load(source)
    auto = getattr(transformers, AUTO["seq2seq"])
    shutil.copytree(source, source.parent / "copy")
    retrofit_checkpoint(str(source), source.parent / "out", CONFIG)
    with pytest.raises(UnsupportedModelError, match="AutoModelForSeq2SeqLM has no class"):
        rpb.load(source.parent / "out", auto)
