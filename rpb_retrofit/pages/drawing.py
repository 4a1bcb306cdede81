"""How the pictures of a page are drawn.

They are to be read without colours: lines differ in dash and marker and have their names at their ends, a filled marker
is a difference that was found and a hollow one is none, and colour maps get lighter all the way.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from rpb_retrofit.evaluation.plots import STYLE, log2_positions

Row = Mapping[str, Any]

COLOURS = "cividis"
"""A map whose lightness rises evenly, alike for all kinds of colour vision."""

SIZE = (4.4, 3.3)
"""Inches of a picture without the names at its lines' ends: small, so that letters stay legible on a phone."""


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn. A ``thin`` one has no markers and intervals: it is there for comparison."""

    colour: str
    dash: Any  # as matplotlib takes it: a name, or lengths of ink and gap
    marker: str
    thin: bool = False


LINE_STYLES = (
    LineStyle("#000000", "--", "o"),
    LineStyle("#C44E00", "-", "D"),
    LineStyle("#0072B2", "-.", "s"),
    LineStyle("#008060", ":", "^"),
    LineStyle("#7B4FA3", (0, (1, 3)), "v"),
)
"""Styles that differ in dash, marker and colour."""

OTHER = LineStyle("#555555", "-", "v")
"""For what nothing was chosen for."""

LineStyles = Mapping[str, LineStyle]
"""Styles by the name of a line; what is missing is drawn as `OTHER`."""


@dataclass(frozen=True)
class Label:
    """What a point (x, y) of a picture, often the end of a line, is called there."""

    name: str
    x: float
    y: float
    style: LineStyle


def as_data_uri(draw: Callable[[], Any], kind: Literal["svg", "png"] = "svg") -> str:
    """What ``draw`` returns, a figure, as an address that holds all of it; the same bytes for the same numbers."""
    buffer = io.BytesIO()
    with plt.rc_context({**STYLE, "svg.hashsalt": "rpb_retrofit"}):
        figure = draw()
        dated = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=130, metadata=dated)
        plt.close(figure)
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def arms_of(rows: Iterable[Row]) -> list[str]:
    """The arms that rows are of, in their order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def drawable(value: float) -> float:
    """NaN in the place of an infinity, which matplotlib would lose the whole axis over."""
    return value if math.isfinite(value) else math.nan


def bands(
    axes: Any, rows: Sequence[Row], styles: LineStyles, place: Callable[[Row], float], middle: str, shaded: bool = True
) -> list[Label]:
    """A line for each arm on a log axis of positions, and if ``shaded`` the band between ``low`` and ``high``."""
    labels = []
    log2_positions(axes)
    longest = max((row.get("length", 0) for row in rows), default=0)
    for arm in arms_of(rows):
        own, style = [row for row in rows if row["arm"] == arm], styles.get(arm, OTHER)
        x = [place(row) for row in own]
        y = [drawable(row[middle]) for row in own]
        if style.thin:
            axes.plot(x, y, color=style.colour, ls=style.dash, lw=0.8)
        else:
            axes.plot(x, y, color=style.colour, ls=style.dash, marker=style.marker, ms=4, lw=1.6)
        if shaded and not style.thin:
            low, high = ([drawable(row[bound]) for row in own] for bound in ("low", "high"))
            axes.fill_between(x, low, high, color=style.colour, alpha=0.13, lw=0)
            for bound in (low, high):
                axes.plot(x, bound, color=style.colour, ls=style.dash, lw=0.5)
        size = own[-1].get("length", longest)
        labels.append(Label(arm if size == longest else f"{arm} ({size} tokens)", x[-1], y[-1], style))
    return labels


def points(axes: Any, series: Mapping[str, Sequence[Row]], styles: LineStyles, place: str) -> list[Label]:
    """A line with intervals for each series over evenly spaced sizes, its points beside those of the others."""
    sizes = sorted({row[place] for rows in series.values() for row in rows})
    bold = [name for name in series if not styles.get(name, OTHER).thin]
    labels = []
    for name, rows in series.items():
        style = styles.get(name, OTHER)
        # Aside, so that intervals do not lie on one another.
        aside = 0.0 if style.thin else 0.09 * (bold.index(name) - (len(bold) - 1) / 2)
        x = [sizes.index(row[place]) + aside for row in rows]
        y = [drawable(row["mean"]) for row in rows]
        axes.plot(x, y, color=style.colour, ls=style.dash, lw=0.8 if style.thin else 1.3)
        for at, row in zip(x, rows, strict=True):
            if not style.thin:
                mark(axes, at, row, style)
        labels.append(Label(name, x[-1], y[-1], style))
    axes.xaxis.set_major_locator(FixedLocator(range(len(sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{size}" for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    return labels


def mark(axes: Any, at: float, row: Row, style: LineStyle, across: bool = False) -> None:
    """A mean with its interval; the marker is filled where the difference is real."""
    mean, low, high = (drawable(row[key]) for key in ("mean", "low", "high"))
    # An interval of paired items need not hold the mean after rounding: matplotlib refuses lengths below zero.
    reach = [[max(0.0, mean - low)], [max(0.0, high - mean)]] if math.isfinite(low) and math.isfinite(high) else None
    place = {"x": mean, "y": at, "xerr": reach} if across else {"x": at, "y": mean, "yerr": reach}
    filling = style.colour if row["real"] else "white"
    axes.errorbar(
        **place, color=style.colour, marker=style.marker, ms=6, mfc=filling, ls="none", capsize=3, lw=1.3, zorder=3
    )


def listed(axes: Any, rows: Sequence[tuple[str, Row, LineStyle]], form: str = "+.3f") -> None:
    """Named means with their intervals, one below the other, the number beside each."""
    for number, (_, row, style) in enumerate(rows):
        mark(axes, number, row, style, across=True)
        axes.annotate(
            f"{row['mean']:{form}}", (1.02, number), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9
        )
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
