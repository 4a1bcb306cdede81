"""A run of many processes: the same weights as of one, and an end for all when one of them is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rpb_retrofit as rpb
from rpb_retrofit.errors import TrainingError
from rpb_retrofit.training.checkpoints import Checkpoints
from rpb_retrofit.training.recipe import Recipe
from tests.support.tensors import assert_close, weights_of
from tests.support.training_cases import RECIPE, losses, run, write_encoder, write_retrofit

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"])
def test_two_processes_are_one(mode: str, retrofit: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text())
    done = launch(mode, retrofit, tmp_path / "out", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-4)
    assert_close(weights_of(tmp_path / "out"), weights_of(whole), atol=1e-4, rtol=1e-3)
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    known = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert (summary["processes"], summary["mode"]) == (2, known.get(mode, "DEEPSPEED"))
    rpb.load(tmp_path / "out")


def test_a_bare_encoder_on_two_processes(text: Path, whole: Path, tmp_path: Path) -> None:
    """Its pooler has no gradient, which DDP would wait for."""
    retrofit = write_retrofit(write_encoder(tmp_path / "source", head=False), tmp_path / "retrofit")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text().replace("next-token", "distillation"))
    done = launch("ddp", retrofit, tmp_path / "out", recipe)
    assert done.returncode == 0, done.stderr[-2000:]


def test_going_on_in_another_way(retrofit: Path, text: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    poisoned = {"spike": 1e-9, "stages": [{"train": "all", "tokens": 3840, "lengths": {64: 1}}]}
    with pytest.raises(TrainingError, match="spike"):
        run(retrofit, out, text, poisoned)
    settings = {**RECIPE, "data": [{"name": str(text)}], **poisoned}
    recipe.write_text(Recipe.model_validate(settings).to_yaml())
    done = launch("fsdp2", retrofit, out, recipe)
    assert done.returncode != 0
    assert "holds whole weights, and this run has FSDP2's ones: go on as it was begun, or --restart" in done.stderr


def test_tables_stay_float32_under_fsdp2(retrofit: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """In bfloat16 FSDP2 casts what it shards, and rounded tables are refused by the attention: they have their own
    groups."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text().replace("precision: 'no'", "precision: bf16"))
    done = launch("fsdp2", retrofit, tmp_path / "out", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    run(retrofit, tmp_path / "one", text, {"precision": "bf16"})
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=5e-3)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "out")
    tables = [name for name in one if "relative_attention_bias" in name]
    for name in tables:
        torch.testing.assert_close(two[name], one[name], atol=2e-2, rtol=0)
    assert tables and not torch.equal(one[tables[0]], weights_of(retrofit)[tables[0]])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2-full"])
def test_a_killed_rank_ends_the_launcher(mode: str, retrofit: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text().replace("save_every: 5", "save_every: 2"))
    out = tmp_path / "out"
    launched = subprocess.Popen(
        command(mode, retrofit, out, recipe), env=environment(), cwd=ROOT, stderr=subprocess.PIPE
    )
    saved = Checkpoints(tmp_path / "out.run" / "stage-2.checkpoints", 2)
    deadline = time.monotonic() + 120
    while saved.last() is None:
        assert launched.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(rank_of(launched.pid, 1), signal.SIGKILL)
    start = time.monotonic()
    _, errors = launched.communicate(timeout=60)
    assert launched.returncode != 0 and time.monotonic() - start < 45
    assert b"Signal 9 (SIGKILL)" in errors
    kept = [file for file in saved.folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in kept} == {".safetensors", ".json"}, "no pickle"
    assert launch(mode, retrofit, out, recipe).returncode == 0
    assert losses(out) == pytest.approx(losses(whole), abs=1e-4)


def rank_of(parent: int, rank: int) -> int:
    """The process of a rank among a launcher's children."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("no such process")


def command(mode: str, retrofit: Path, out: Path, recipe: Path) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ROOT / "scripts" / "configs" / f"{mode.removesuffix('-full')}-cpu.yaml"
    if mode.endswith("-full"):
        launcher += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
    port = str(random.randint(20_000, 60_000))
    program = [str(ROOT / "scripts" / "finetune.py"), str(retrofit), str(out), "--recipe", str(recipe)]
    return [*launcher, "--config_file", str(config), "--main_process_port", port, *program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def launch(mode: str, retrofit: Path, out: Path, recipe: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(mode, retrofit, out, recipe), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
