"""The result of a comparison as one document: what was measured, what is recommended, and under which constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rpb_retrofit.comparison.candidates import Constraints
from rpb_retrofit.comparison.figures import figures, table
from rpb_retrofit.comparison.recommend import recommend
from rpb_retrofit.comparison.run import Comparison
from rpb_retrofit.version import __version__


def result(comparison: Comparison, constraints: Constraints, about: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, as JSON takes it; ``about`` is what the caller knows: the source's name, the text, the command."""
    measured = figures(comparison)
    answer = recommend(table(measured), constraints)
    return {
        "version": __version__,
        **about,
        "headline": answer.headline,
        **measured,
        "skipped": dict(comparison.skipped),
        "constraints": asdict(constraints),
        "recommendation": asdict(answer),
    }
