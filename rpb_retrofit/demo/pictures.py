"""The pictures of the demo, from its figures as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt

from rpb_retrofit.evaluation.plots import log2_positions
from rpb_retrofit.pages.drawing import LINE_STYLES, SIZE, Label, LineStyles, Row, drawable, mark, points
from rpb_retrofit.pages.labels import name_ends

ASIDE = 1.06
"""By how many times markers of one bin of positions lie apart, so that their intervals do not hide each other."""


def styles_of(names: Sequence[str]) -> LineStyles:
    """How the models are drawn, the source first, in every picture."""
    return dict(zip(names, LINE_STYLES, strict=False))


def above_source(rows: Sequence[Row], styles: LineStyles) -> Any:
    """Loss above the source's by position in the window, a line with 95% intervals for each retrofit."""
    figure, axes = plt.subplots(figsize=SIZE)
    log2_positions(axes)
    axes.axhline(0, color="grey", lw=0.8)
    labels = []
    names = list(dict.fromkeys(row["arm"] for row in rows))
    for number, name in enumerate(names):
        own, style = [row for row in rows if row["arm"] == name], styles[name]
        aside = ASIDE ** (2 * number - len(names) + 1)
        x = [aside * math.sqrt(row["first"] * row["last"]) for row in own]
        y = [drawable(row["mean"]) for row in own]
        axes.plot(x, y, color=style.colour, ls=style.dash, lw=1.3)
        for at, row in zip(x, own, strict=True):
            mark(axes, at, row, style)
        labels.append(Label(name, x[-1], y[-1], style))
    axes.set_xlabel("position in the window (tokens of context)")
    axes.set_ylabel("loss above the source's\n(nats a token)")
    name_ends(axes, labels)
    return figure


def span_gains(gains: Mapping[str, Mapping[int, Sequence[float]]], styles: LineStyles) -> Any:
    """What a repeated span gains by its distance, a line for each model; bars reach from the least item to the most."""
    series = {
        name: [
            {
                "distance": distance,
                "mean": sum(items) / len(items),
                **{"low": min(items), "high": max(items), "real": True},
            }
            for distance, items in by_distance.items()
        ]
        for name, by_distance in gains.items()
    }
    figure, axes = plt.subplots(figsize=SIZE)
    labels = points(axes, series, styles, "distance")
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xlabel("distance of the two spans (tokens)")
    axes.set_ylabel("gain (nats a token)")
    name_ends(axes, labels)
    return figure
