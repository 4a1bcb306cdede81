"""Tiny sources on disk, one for each test, which may do to it what it likes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sources import write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny llama and its tokenizer."""
    return write_source(tmp_path / "source")


@pytest.fixture
def furnished(tmp_path: Path) -> Path:
    """A tiny llama with all that may lie beside a model."""
    folder = write_source(tmp_path / "source", chat_template="{{ messages[0]['content'] }}!")
    (folder / "README.md").write_text("the source's card")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("pickle")
    return folder
