"""The tests that the pages of the repository name are there."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "model_cards").glob("*.md"))]

NAMED = re.compile(
    r"(?P<file>(?:[\w*.-]+/)*test_[\w*]+\.py)"  # as a path from the root or from tests/
    r"|::(?P<test>test_[\w*]+)"  # of the file that is named before it
    r"|`(?P<alone>test_\w+)`"  # of any file
    r"|\btests/(?P<place>[a-z][\w/-]*(?:\.\w+)?)"
)
"""What may be named, with ``*`` for any characters."""


@cache
def names_in(file: Path) -> list[str]:
    """The names of a file's test functions."""
    tree = ast.parse(file.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def missing(page: str) -> list[str]:
    """What a page names and the tests do not have, in the page's words."""
    files: list[Path] = []
    everywhere = sorted(TESTS.rglob("test_*.py"))
    lacking = []
    for named in NAMED.finditer(page):
        if named["file"]:
            files = sorted(TESTS.glob(named["file"].removeprefix("tests/")))
            there = bool(files)
        elif named["place"]:
            there = (TESTS / named["place"]).exists()
        else:
            pattern, among = (named["test"], files) if named["test"] else (named["alone"], everywhere)
            there = any(fnmatchcase(name, pattern) for file in among for name in names_in(file))
        if not there:
            lacking.append(named[0])
    return lacking


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    assert not missing(page.read_text())


@pytest.mark.parametrize(
    "wrong",
    [
        "tests/runtime/test_nothing.py",
        "test_cards.py::test_nothing",
        "`runtime/test_settings.py`, `::test_named_tests_exist`",
        "`test_nothing`",
        "`test_cards.py::test_nothing_*`",
        "`nowhere/test_*.py`",
        "pytest tests/nowhere",
        "tests/families/nothing.py",
    ],
)
def test_a_wrong_name_is_noticed(wrong: str) -> None:
    right = (
        "`pytest tests/families/test_contract.py`, `runtime/test_*.py`, `test_cards.py::test_named_*`, `tests/support`"
    )
    assert not missing(right)
    assert len(missing(f"{right}, {wrong}")) == 1
