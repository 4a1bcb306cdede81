"""A small language model, its retrofit, a text, and an undisturbed run of the one on the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.training_cases import PROSE, run, write_retrofit, write_source


@pytest.fixture(scope="package")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="package")
def retrofit(source: Path) -> Path:
    return write_retrofit(source, source.parent / "retrofit")


@pytest.fixture(scope="package")
def text(source: Path) -> Path:
    file = source.parent / "text.txt"
    file.write_text(PROSE)
    return file


@pytest.fixture(scope="package")
def whole(retrofit: Path, text: Path) -> Path:
    """A run that nothing disturbed, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(retrofit, retrofit.parent / "whole", text)
    torch.set_num_threads(threads)
    return retrofit.parent / "whole"
