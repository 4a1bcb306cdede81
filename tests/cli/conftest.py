"""One folder for all tests of the command line, which is not to be changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.training_cases import PROSE, write_retrofit, write_source


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its retrofit, a text, a recipe, and links to some of them."""
    folder = tmp_path_factory.mktemp("command")
    write_retrofit(write_source(folder / "source"), folder / "retrofit")
    (folder / "text.txt").write_text(PROSE[:6000])
    (folder / "notes.md").write_text(PROSE[:6000])
    (folder / "recipe.yaml").write_text("seed: 1\nheld_out: text.txt\n")
    (folder / "link.json").symlink_to(folder / "retrofit" / "config.json")
    os.link(folder / "text.txt", folder / "hard.json")
    return folder
