"""The page of a comparison: what to take and why, and all that was measured. It needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpb_retrofit.comparison.exhibits import exhibits
from rpb_retrofit.comparison.listing import arms, pairs
from rpb_retrofit.comparison.ranking import Ranking
from rpb_retrofit.pages.page import write


def write_page(result: Mapping[str, Any], file: Path) -> None:
    """Write a page about ``result``, what `rpb_retrofit.comparison.result` makes, to ``file``."""
    ranking = Ranking(result)
    shown = [*exhibits(ranking), *([compared] if (compared := pairs(ranking)) else [])]
    titles = {exhibit.name: exhibit.title for exhibit in shown}
    first = {name: title for name, title in titles.items() if name == "quality"}
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for row in ranking.rows.values():
        by_arm.setdefault(row["arm"], []).append(row)
    write(
        file,
        "rpb_retrofit.comparison",
        "page.html",
        title=f"Positions for {result['source']}, to read {result['target']:,} tokens",
        contents={
            **first,
            "arms": "All arms",
            **{name: title for name, title in titles.items() if name not in first},
            "skipped": "What was skipped",
            "repeat": "How to repeat it",
        },
        result=result,
        answer=result["recommendation"],
        constraints=[
            f"--{name.replace('_', '-')} {bound:,}"
            for name, bound in result["constraints"].items()
            if bound is not None
        ],
        plan={name: value for name, value in result["plan"].items() if value not in ([], (), None)},
        rows=ranking.rows,
        by_arm=by_arm,
        arms=arms(ranking),
        exhibits=shown,
    )
