"""The result of a comparison as one document: what was measured, what is recommended, and under which constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rpb_retrofit.comparison.candidates import Constraints
from rpb_retrofit.comparison.figures import figures, table
from rpb_retrofit.comparison.recommend import recommend
from rpb_retrofit.comparison.run import Comparison
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.files.whole_file import write_whole
from rpb_retrofit.version import __version__


@dataclass(frozen=True)
class ComparisonResult:
    """What was measured, and which row to take. ``document`` is all of it, as report.json holds it."""

    document: Mapping[str, Any]

    @classmethod
    def of(cls, comparison: Comparison, constraints: Constraints, about: Mapping[str, Any]) -> ComparisonResult:
        """The result of what was measured; ``about`` is what the caller knows: the source's name, text, command."""
        measured = figures(comparison)
        answer = recommend(table(measured), constraints)
        return cls(
            {
                "version": __version__,
                **about,
                "headline": answer.headline,
                **measured,
                "skipped": dict(comparison.skipped),
                "constraints": asdict(constraints),
                "recommendation": asdict(answer),
            }
        )

    @property
    def choice(self) -> str | None:
        """The name of the row to take; None where nothing meets the constraints."""
        return self.document["recommendation"]["choice"]

    @property
    def headline(self) -> str:
        """The answer in a sentence."""
        return self.document["headline"]

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The arms, each with what was measured of it: losses in nats a token, times over the source's, and so on."""
        return self.document["rows"]

    def write(self, folder: str | Path) -> None:
        """Write a new folder with report.html and report.json, whole or not at all."""
        with whole_folder(Path(folder)) as partial:
            self.write_page(partial / "report.html")
            write_whole(partial / "report.json", self.as_json())

    def write_page(self, file: str | Path) -> None:
        """Write the report, one HTML page that needs nothing beside it."""
        from rpb_retrofit.comparison.page import write_page

        write_page(self.document, Path(file))

    def write_card(self, file: str | Path, title: str | None = None, about: str = "") -> None:
        """Write a Markdown card, and its pictures beside it; ``about``: a paragraph on what was compared."""
        from rpb_retrofit.comparison.card import write_card

        default = f"Positional mechanisms for {self.document['source']}, to read {self.document['target']:,} tokens"
        write_card(self.document, Path(file), title or default, about)

    def as_json(self) -> str:
        """The document as text, as report.json holds it."""
        return json_text(self.document)

    def __str__(self) -> str:
        answer = self.document["recommendation"]
        return "\n".join([self.headline, *(f"  {sentence}" for sentence in (*answer["reasons"], *answer["failures"]))])
