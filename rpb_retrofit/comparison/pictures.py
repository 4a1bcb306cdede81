"""The pictures of a comparison, from its figures as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rpb_retrofit.pages.drawing import SIZE, Label, LineStyle, LineStyles, Row, bands, drawable, listed, mark, points
from rpb_retrofit.pages.labels import LINE, name_ends, name_points

NEAR = 0.1
"""Nats a token from the lowest loss up to which a scale of losses is about even; beyond, it is a logarithm's."""

LIMIT = "#A00000"
"""The colour of what a user set, and of what the source was trained for."""

FRONT = "#444444"

Series = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class PlottedRow:
    """A row with its loss and its 95% interval; ``real``: it really differs from what all are held against.

    ``budget``: how it was trained; ``time``: over the source's; ``sound``: it runs, so it may be part of a front.
    """

    name: str
    loss: float
    low: float
    high: float
    real: bool
    style: LineStyle
    budget: str = ""
    time: float = math.nan
    sound: bool = True

    @property
    def row(self) -> Row:
        return {"mean": self.loss, "low": self.low, "high": self.high, "real": self.real}


def quality(plotted: Sequence[PlottedRow], limit: float | None) -> Any:
    """Loss against time, with the front of each budget of training: nothing is both faster and better than its steps.

    A line stands at the ``limit`` of the time.
    """
    figure, axes = plt.subplots(figsize=(6.6, max(4.6, 0.26 * len(plotted))))
    stretch(axes, "y", [row.loss for row in plotted])
    for row in plotted:
        mark(axes, row.time, row.row, row.style)
    axes.margins(x=0.2, y=0.08)
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    left, right = axes.get_xlim()
    if limit is not None and left <= limit <= right:
        _limit(axes, limit)
    elif limit is not None and limit > right:
        axes.set_title(f"limit {limit:g} →", loc="right", fontsize=9, color=LIMIT)
    elif limit is not None:
        axes.set_title(f"← limit {limit:g}", loc="left", fontsize=9, color=LIMIT)
    budgets, labels = list(dict.fromkeys(row.budget for row in plotted)), []
    for budget, dash in zip(budgets, ("-", "--"), strict=False):
        steps = front([(row.time, row.loss) for row in plotted if row.budget == budget and row.sound])
        if steps:
            x, y = (np.repeat(values, 2) for values in zip(*steps, strict=True))
            corners = [(x[0], axes.get_ylim()[1]), *zip(x[1:], y, strict=False), (right, y[-1])]
            axes.plot(*zip(*corners, strict=True), color=FRONT, ls=dash, lw=0.9, zorder=1)
            name = "front" if len(budgets) == 1 else f"front, {budget.partition(' ')[0]}"
            labels.append(Label(name, *corners[-1], LineStyle(FRONT, dash, "")))
    axes.set_xlabel("time over the source's")
    axes.set_ylabel("loss at the target (nats a token)")
    name_ends(axes, labels)
    name_points(axes, [Label(row.name, row.time, row.loss, row.style) for row in plotted])
    return figure


def _limit(axes: Any, at: float, what: str = "limit {:g}", side: str = "center") -> None:
    """A line down a picture with its name above it, on one ``side``."""
    axes.axvline(at, color=LIMIT, ls="--", lw=1.2)
    place = axes.get_xaxis_transform()
    axes.annotate(what.format(at), (at, 1.01), xycoords=place, ha=side, va="bottom", fontsize=9, color=LIMIT)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other one is below in both numbers, the lowest of the first number in front."""
    front: list[tuple[float, float]] = []
    for first, second in sorted(points):
        if not front or second < front[-1][1]:
            front.append((first, second))
    return front


def ranking(plotted: Sequence[PlottedRow], label: str, limit: float | None = None, form: str = ".3f") -> Any:
    """Losses with their intervals, one below the other; a line stands at their ``limit``."""
    figure, axes = plt.subplots(figsize=(SIZE[0], 0.9 + 0.3 * len(plotted)))
    differences = form.startswith("+")
    stretch(axes, "x", [row.loss for row in plotted], 0.0 if differences else None)
    listed(axes, [(row.name, row.row, row.style) for row in plotted], form)
    if differences:
        axes.axvline(0, color="grey", lw=0.8)
    if limit is not None:
        _limit(axes, limit)
    axes.set_xlabel(label)
    return figure


def by_length(panels: Mapping[str, Series], styles: LineStyles) -> Any:
    """Loss by length of the window, a line for each row."""
    lowest = [row["mean"] for series in panels.values() for rows in series.values() for row in rows]

    def draw(axes: Any, series: Series) -> None:
        stretch(axes, "y", lowest)
        name_ends(axes, points(axes, series, styles, "length"))
        axes.set_ylabel("loss (nats a token)")

    return _stacked(panels, draw, "tokens of a window")


def by_position(panels: Mapping[str, Series], styles: LineStyles, context: int | None) -> Any:
    """Loss by position in the window, a line for each row; ``context``: where the source's training ended."""
    lowest = [row["nll"] for series in panels.values() for rows in series.values() for row in rows]

    def draw(axes: Any, series: Series) -> None:
        stretch(axes, "y", lowest)
        rows = [{**row, "arm": name} for name, own in series.items() for row in own]
        labels = bands(axes, rows, styles, lambda row: math.sqrt(row["first"] * row["last"]), "nll", shaded=False)
        if context is not None:
            _limit(axes, context, "trained to {:,}", "right")
        name_ends(axes, labels)
        axes.set_ylabel("loss (nats a token)")

    return _stacked(panels, draw, "position in the window (tokens of context)")


def induction(panels: Mapping[str, Series], styles: LineStyles) -> Any:
    """What the first of two equal spans brings the second, by the distance between them, with 95% intervals."""

    def draw(axes: Any, series: Series) -> None:
        labels = points(axes, series, styles, "distance")
        axes.axhline(0, color="grey", lw=0.8)
        name_ends(axes, labels)
        axes.set_ylabel("gain (nats a token)")

    return _stacked(panels, draw, "distance of the two spans (tokens)")


def speed(panels: Mapping[str, Series], styles: LineStyles, limit: float | None) -> Any:
    """Times over the source's by length of the prompt, with their limit."""

    def draw(axes: Any, series: Series) -> None:
        labels = points(axes, series, styles, "length")
        axes.axhline(1, color="grey", lw=0.8)
        low, high = axes.get_ylim()
        if limit is not None and low < limit < high:
            axes.axhline(limit, color=LIMIT, ls="--", lw=1.2)
            axes.text(-0.45, limit, f"limit {limit:g}", va="bottom", fontsize=9, color=LIMIT)
        name_ends(axes, labels)
        axes.set_ylabel("times the source's")

    return _stacked(panels, draw, "tokens of the prompt")


def stretch(axes: Any, which: str, losses: Sequence[float], lowest: float | None = None) -> None:
    """A scale of losses on which small differences near the ``lowest`` show beside large ones far from it."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    zero = min(finite) if lowest is None else lowest
    axis, scale = (axes.xaxis, axes.set_xscale) if which == "x" else (axes.yaxis, axes.set_yscale)

    def place(loss: Any) -> Any:
        return np.arcsinh((np.asarray(loss) - zero) / NEAR)

    scale("function", functions=(place, lambda at: zero + NEAR * np.sinh(at)))
    room = 0.12 * max(1.0, place(max(finite)) - place(min(finite)))
    ticks: list[float] = []
    for step in _STEPS:
        for tick in step * np.arange(math.ceil((min(finite) - 1) / step), math.floor((max(finite) + 1) / step) + 1):
            if all(abs(place(tick) - place(other)) > room for other in ticks):  # so that no number hides another
                ticks.append(tick)
    axis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda loss, _: f"{drawable(loss):g}"))


_STEPS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Nats a token between the numbers of a scale: the round ones first, the others where there is room."""


def _stacked(panels: Mapping[str, Series], draw: Callable[[Any, Series], None], label: str) -> Any:
    """Panels one below the other, each as high as the names at the ends of its lines need."""
    heights = [max(2.5, 0.2 + 1.05 * LINE / 72 * len(series)) for series in panels.values()]
    above, below, between = 0.4, 0.6, 0.6
    whole = above + sum(heights) + between * (len(heights) - 1) + below
    figure, drawn = plt.subplots(
        len(panels),
        1,
        figsize=(SIZE[0], whole),
        squeeze=False,
        gridspec_kw={
            **{"height_ratios": heights, "hspace": between * len(heights) / sum(heights)},
            **{"top": 1 - above / whole, "bottom": below / whole},
        },
    )
    for axes, (title, series) in zip(drawn[:, 0], panels.items(), strict=True):
        draw(axes, series)
        if len(panels) > 1:
            axes.set_title(title, fontsize=10, loc="left", pad=16)
    drawn[-1, 0].set_xlabel(label)
    return figure
