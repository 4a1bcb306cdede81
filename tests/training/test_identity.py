"""What runs and examinations depend on: all of the weights, the config, the tokenizer and the text, as they are now."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.open_models import identity
from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.digest import digest, digest_of
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import read_rows, read_text
from rpb_retrofit.training import identity as identity_module
from rpb_retrofit.training.documents import open_sources
from rpb_retrofit.training.identity import fingerprint, identity_of
from rpb_retrofit.training.recipe import Recipe
from tests.support.training_cases import PROSE, RECIPE, write_retrofit, write_source

# --- text ------------------------------------------------------------------------------------------------------------


def as_text(file: Path, text: str) -> None:
    file.write_text(text)


def as_rows(file: Path, text: str) -> None:
    file.write_text(json.dumps({"text": text}) + "\n")


def as_parquet(file: Path, text: str) -> None:
    datasets.Dataset.from_dict({"text": [text]}).to_parquet(file)


READERS: dict[str, Callable[[str], str]] = {
    "evaluation": lambda file: read_text(file).documents[0],
    "calibration": lambda file: CalibrationText.of(file).text.documents[0],
    "training": lambda file: open_sources(Recipe(data=[{"name": file}], held_out=file))[0][0].next(),
    "held out": lambda file: open_sources(Recipe(data=[{"name": file}], held_out=file))[2][0],
    "streaming": lambda file: next(iter(read_rows(file, "data", streaming=True)))["text"],
}


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("reader", READERS)
def test_text_is_what_the_file_holds_now(reader: str, ending: str, tmp_path: Path) -> None:
    """Also where another content has the same size and the same time, as after `cp -p`, tar and rsync."""
    file = tmp_path / f"text{ending}"
    write = {".txt": as_text, ".jsonl": as_rows, ".parquet": as_parquet}[ending]
    for content in ("one of them", "two of them", "one of them"):
        write(file, content)
        os.utime(file, (1e9, 1e9))
        assert READERS[reader](str(file)) == content


def test_checksums_tell_texts_apart() -> None:
    assert len({digest_of(parts) for parts in ([b"ab"], [b"a", b"b"], [b"", b"ab"], [b"ab", b""], [b"ba"])}) == 5


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def retrofit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, so that the float32 tables stand first in their file, with more than a megabyte behind them."""
    folder = tmp_path_factory.mktemp("identity")
    model = rpb.load(write_retrofit(write_source(folder / "source"), folder / "first"), dtype=torch.bfloat16)
    model.resize_token_embeddings(8192)
    model.save_pretrained(folder / "retrofit")
    for file in (folder / "first").glob("tokenizer*"):
        shutil.copy(file, folder / "retrofit")
    return folder / "retrofit"


def change_tables(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tables = [name for name in tensors if "relative_attention_bias" in name]
    save_file({n: t + 1 if n in tables else t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    assert tables and file.stat().st_size > 2 << 20


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))


def change_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}'))


@pytest.mark.parametrize("change", [change_tables, change_config, change_tokenizer])
def test_a_changed_checkpoint_is_another(change: Callable[[Path], None], retrofit: Path, tmp_path: Path) -> None:
    other = tmp_path / "retrofit"
    shutil.copytree(retrofit, other)
    assert fingerprint(str(other)) == fingerprint(str(retrofit))
    sizes = {file.name: file.stat().st_size for file in other.glob("*.safetensors")}
    change(other)
    assert {file.name: file.stat().st_size for file in other.glob("*.safetensors")} == sizes
    assert fingerprint(str(other)) != fingerprint(str(retrofit))
    plan, text = {"tokens": 1}, "text"
    assert identity({"retrofit": str(other)}, text, plan) != identity({"retrofit": str(retrofit)}, text, plan)


def test_what_a_run_depends_on(retrofit: Path, tmp_path: Path) -> None:
    """Weights that are trained, those that teach, and the whole of each text."""
    text, source = tmp_path / "text.txt", tmp_path / "source"
    text.write_text(PROSE * 60)
    assert text.stat().st_size > 3 << 20
    write_source(source)
    recipe = Recipe.model_validate({**RECIPE, "objective": "distillation", "data": [{"name": str(text)}]})

    def now() -> dict[str, object]:
        return identity_of(str(retrofit), str(retrofit), str(source), recipe, control=False)

    identities = [now()]
    text.write_text("X" + text.read_text()[1:])
    identities.append(now())
    change_config(source)
    identities.append(now())
    assert (
        identities[0]["texts"] != identities[1]["texts"] and identities[1] != identities[2] and identities[2] == now()
    )
    assert identities[1]["source_weights"] != identities[2]["source_weights"]


@pytest.mark.parametrize("repeats", [0.0, 0.3])
def test_runs_from_before_there_were_repeats_go_on(repeats: float, retrofit: Path) -> None:
    """Where there are none, what a run depends on is what it was: every key of the recipe but that one."""
    recipe = Recipe.model_validate({**RECIPE, "repeats": repeats})
    identity = identity_of(str(retrofit), str(retrofit), str(retrofit), recipe, control=False)
    settings = recipe.model_dump(mode="json")
    assert identity["recipe"] == {key: value for key, value in settings.items() if repeats or key != "repeats"}


def test_files_that_do_not_count(retrofit: Path, tmp_path: Path) -> None:
    """A card or a report that is written beside the weights makes no other model of them."""
    other = tmp_path / "retrofit"
    shutil.copytree(retrofit, other)
    (other / "README.md").write_text("a card")
    (other / "report.json").write_text("{}")
    assert fingerprint(str(other)) == fingerprint(str(retrofit))
    (other / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        fingerprint(str(other))
    with pytest.raises(CheckpointError, match=r"'.*absent.gguf' cannot be read: No such file"):
        fingerprint(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize("at", [0, 5_000_000, 9_999_999])
def test_every_byte_counts(at: int, tmp_path: Path) -> None:
    data = bytearray(10_000_000)
    (tmp_path / "a").write_bytes(data)
    data[at] = 1
    (tmp_path / "b").write_bytes(data)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_digests_are_of_whole_files_only_once(retrofit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard and every file beside them that counts is read, none twice."""
    read: list[str] = []
    real = identity_module.digest

    def counted(file: Path) -> str:
        read.append(file.name)
        return real(file)

    monkeypatch.setattr(identity_module, "digest", counted)
    assert sorted(fingerprint(str(retrofit))) == sorted(read) and len(set(read)) == len(read)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(read)
