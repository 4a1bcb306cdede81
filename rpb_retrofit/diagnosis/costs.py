"""What the retrofit loses, of all the costs that the figures hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpb_retrofit.diagnosis.arms import RETROFIT, baseline

Figures = dict[str, Any]
"""What was measured, as plain numbers by name."""


def retrofit_costs(figures: Mapping[str, Any], above: str | None = None) -> list[Figures]:
    """What the retrofit loses above a role, by length; by default above the control where that was measured, or else
    above the source. Empty where no loss was measured."""
    costs = [cost for cost in (figures.get("loss") or {}).get("costs", []) if cost["arm"] == RETROFIT]
    above = above or baseline({cost["above"] for cost in costs})
    return [cost for cost in costs if cost["above"] == above]
