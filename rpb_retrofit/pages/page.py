"""A page that needs nothing beside it: what is told first, then exhibits, each a picture with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from rpb_retrofit.pages.words import begun, number

SHARED = "rpb_retrofit.pages"
"""The package of the templates that all pages share."""


@dataclass(frozen=True)
class Table:
    """Numbers under a picture. The first cell of a row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exhibit:
    """What was measured: a picture where there is one, how to read it, and its numbers.

    ``name`` is its anchor; ``least_width`` is the width in rem below which the picture scrolls rather than shrinks;
    the ``tables`` are folded away unless they are ``open``, and what is ``shown`` stands above them.
    """

    name: str
    title: str
    caption: str
    tables: Sequence[Table]
    picture: str | None = None
    alt: str = ""
    sentences: Sequence[str] = ()
    least_width: int = 0
    shown: Sequence[Table] = ()
    open: bool = False


def write(file: Path, package: str, template: str, title: str, contents: Mapping[str, str], **about: Any) -> None:
    """Write the page of a ``package``'s ``template``, which extends ``base.html``, to ``file``.

    A package without templates of its own names `SHARED`. ``contents`` are titles by anchor;
    ``about`` is whatever else the template asks for.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, "templates") for name in dict.fromkeys((package, SHARED))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(value=number, begun=begun)
    page = environment.get_template(template).render(title=title, contents=contents, **about)
    file.write_text(page, encoding="utf-8", errors="backslashreplace")
