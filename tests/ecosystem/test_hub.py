"""An upload to the hub, to a server that stands for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rpb_retrofit as rpb
from rpb_retrofit.runtime.locks import FILE_LOCKS, LOCK
from rpb_retrofit.runtime.modeling import RUNTIME_FILES
from tests.families.cases import BY_NAME
from tests.support.hub_stub import HubServer
from tests.support.tiny_models import logits_of, retrofitted, saved_config

pytestmark = pytest.mark.process


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that speaks as much of the hub's protocol as an upload needs: its address, and where the files go."""
    server = HubServer(tmp_path / "hub")
    server.folder.mkdir()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.url, server.folder
    server.shutdown()
    server.server_close()


def test_push_to_hub(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, uploaded = hub
    model = retrofitted(BY_NAME["llama"])
    model.save_pretrained(tmp_path / "out")
    script = "import sys, rpb_retrofit as rpb; rpb.load(sys.argv[1]).push_to_hub('someone/retrofit')"
    environment = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_stub",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", *RUNTIME_FILES} <= {path.name for path in uploaded.iterdir()}
    assert all(saved_config(uploaded)[name] == LOCK for name in ("attn_implementation", *FILE_LOCKS))
    assert torch.equal(logits_of(rpb.load(uploaded)), logits_of(model))
    for name in RUNTIME_FILES:
        assert (uploaded / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
