"""What `rpb retrofit` answers wrong input with: one line, and nothing made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import refusal, rpb_command
from tests.support.sources import edit_config


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
    furnished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(furnished)
    arguments = ("retrofit", furnished, tmp_path / "out", "--init", "zeros", *options)
    assert answer in refusal(monkeypatch, capsys, *arguments)
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
