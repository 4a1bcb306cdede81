"""What models find in their context, as every page shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from rpb_retrofit.pages.drawing import COLOURS, Row
from rpb_retrofit.pages.page import Table
from rpb_retrofit.pages.words import number

QUESTIONS = (
    "Share of the questions whose likeliest continuation is the right answer, by kind, length of the context and how "
    "far into it the answer stands; spread: it has to be gathered from all over it. Light is more."
)

SPANS = (
    "By how much a span of random tokens is predicted better for having stood in the context before, by the distance "
    "between the two. A filled marker is a gain that was found, a hollow one is none; bars are 95% intervals."
)


def answers(cells: Sequence[Row]) -> Table:
    """The cells of `shares` as numbers."""
    rows = [
        [
            *(c["arm"], c["kind"], str(c["length"]), "spread" if c["depth"] is None else f"{c['depth']:.0%}"),
            *(str(c["items"]), f"{c['correct']:.0%}", number(c["nll"])),
        ]
        for c in cells
    ]
    return Table("Answers", ("arm", "kind", "tokens", "depth", "questions", "right", "loss of the answer"), rows)


def shares_width(cells: Sequence[Row]) -> int:
    """Rem below which the picture of `shares` cannot be read."""
    return 12 + 3 * len({(cell["length"], cell["depth"]) for cell in cells})


def shares(rows: Sequence[Row], panel: str, line: str) -> Any:
    """Share of the questions answered right by length and depth: a panel for each ``panel``, in it a row a ``line``."""
    names, lines = (list(dict.fromkeys(row[key] for row in rows)) for key in (panel, line))
    columns = sorted(
        {(row["length"], row["depth"]) for row in rows}, key=lambda c: (c[0], math.inf if c[1] is None else c[1])
    )
    height = 0.34 * len(lines) + 0.5
    figure, panels = plt.subplots(
        len(names),
        1,
        figsize=(2.4 + 0.62 * len(columns), height * len(names) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for name, axes in zip(names, panels[:, 0], strict=True):
        right = np.full((len(lines), len(columns)), np.nan)
        for row in rows:
            if row[panel] == name:
                right[lines.index(row[line]), columns.index((row["length"], row["depth"]))] = row["correct"]
        axes.imshow(right, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
        for (y, x), share in np.ndenumerate(right):
            if np.isfinite(share):
                ink = "white" if share < 0.5 else "black"
                axes.text(x, y, f"{100 * share:.0f}%", ha="center", va="center", color=ink, fontsize=9)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_title(name, fontsize=10, loc="left")
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(len(columns)), [""] * len(columns))
        axes.spines[:].set_visible(False)
    marks = [f"{length}\n{'spread' if depth is None else f'at {depth:.0%}'}" for length, depth in columns]
    panels[-1, 0].set_xticks(range(len(columns)), marks, fontsize=8)
    panels[-1, 0].set_xlabel("tokens of the context, and where in it the answer stands")
    return figure
