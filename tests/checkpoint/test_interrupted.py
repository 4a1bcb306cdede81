"""A conversion that is killed, or whose disk is full, leaves no OUT behind."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from tests.support.command import RPB
from tests.support.tiny_models import CONFIG

pytestmark = pytest.mark.process


def test_kill_leaves_nothing(furnished: Path, tmp_path: Path) -> None:
    """kill -9 while the weights are written: no OUT; the next run sweeps up and succeeds."""
    big = {f"filler.{i}": torch.zeros(16 << 20) for i in range(8)}
    save_file(
        big | load_file(furnished / "model.safetensors"), furnished / "model.safetensors", metadata={"format": "pt"}
    )
    del big
    process = subprocess.Popen(
        [*RPB, "retrofit", furnished, tmp_path / "out", "--init", "zeros"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/model-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".out.partial-*"))
    assert not (tmp_path / "out").exists()
    retrofit_checkpoint(str(furnished), tmp_path / "out", CONFIG)
    assert not list(tmp_path.glob(".out.partial-*"))
    rpb.load(tmp_path / "out")


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_full_disk_leaves_nothing(furnished: Path, tmp_path: Path, limit: int) -> None:
    """A limit on file sizes stands for the disk: first the config, then the weights do not fit."""
    command = [*RPB, "retrofit", str(furnished), str(tmp_path / "out"), "--init", "zeros"]

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, preexec_fn=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"rpb: writing '{tmp_path / 'out'}' failed: File too large; nothing was left behind")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
