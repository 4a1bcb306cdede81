"""The demo's report: one page that needs nothing but the two pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from rpb_retrofit.version import __version__

if TYPE_CHECKING:
    from rpb_retrofit.demo.run import Demo


def write_report(demo: Demo, beginnings: Sequence[str], folder: Path) -> None:
    """Write ``report.html`` into ``folder``, which holds the pictures."""
    loader = PackageLoader("rpb_retrofit.demo", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(demo=demo, beginnings=beginnings, version=__version__)
    (folder / "report.html").write_text(page, encoding="utf-8")
