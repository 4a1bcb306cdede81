"""The tour runs from its first cell to its last, on a small model; what is committed was run, and is small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.training_cases import write_source

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "tour.ipynb"


@pytest.fixture
def tour() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(tour: Any) -> list[Any]:
    return [cell for cell in tour.cells if cell.cell_type == "code"]


def printed(tour: Any) -> str:
    """What its cells print."""
    return "".join(output.text for cell in code(tour) for output in cell.outputs if output.get("name") == "stdout")


def test_it_runs(tour: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": write_source(tmp_path / "model"), "TOKENS": 1024, "WINDOW": 128}.items():
        monkeypatch.setenv(f"RPB_TOUR_{name}", str(value))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for cell in code(tour):
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(tour, timeout=300, kernel_name="python3", resources=resources).execute()
    text = printed(tour)
    assert "2 of 2 layers patched" in text
    assert "healed" in text
    assert "Does it run right?" in text
    assert "equal: True" in text
    assert any("image/png" in output.get("data", {}) for cell in code(tour) for output in cell.outputs)


def test_what_is_committed_was_run(tour: Any) -> None:
    """In order, on the real model, without an error; the file is small, and names no place of the machine it ran on."""
    assert [cell.execution_count for cell in code(tour)] == list(range(1, len(code(tour)) + 1))
    assert not any(output.output_type == "error" for cell in code(tour) for output in cell.outputs)
    assert "30 of 30 layers patched" in printed(tour)
    assert "equal: True" in printed(tour)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000
    for place in ("/root/", "/home/", "site-packages"):
        assert place not in text
