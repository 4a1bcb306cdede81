"""The pictures of a diagnosis, from its figures as plain numbers.

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

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from rpb_retrofit.diagnosis.words import some
from rpb_retrofit.evaluation.plots import STYLE, log2_positions

Row = Mapping[str, Any]

COLOURS = "cividis"
"""A map whose lightness rises evenly, alike for all kinds of colour vision."""


SIZE = (4.4, 3.3)
"""Inches of a picture without the names at its lines' ends: small, so that letters stay legible on a phone."""


@dataclass(frozen=True)
class _Look:
    colour: str
    dash: Any  # as matplotlib takes it: a name, or lengths of ink and gap
    marker: str


_LOOKS = {
    "source": _Look("#000000", "--", "o"),
    "control": _Look("#0072B2", "-.", "s"),
    "untrained": _Look("#008060", ":", "^"),
    "retrofit": _Look("#C44E00", "-", "D"),
}
"""How an arm is drawn, in every picture."""

_COST_LOOKS = [
    _Look("#C44E00", "-", "D"),
    _Look("#0072B2", "-.", "s"),
    _Look("#000000", "--", "o"),
    _Look("#008060", ":", "^"),
    _Look("#7B4FA3", (0, (1, 3)), "v"),
]
"""How a cost is drawn, by its place among the pairs of arms that are compared."""


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


def loss_by_position(rows: Sequence[Row]) -> Any:
    """Loss by position in the window, a line with its 95% band for each arm."""
    figure, axes = plt.subplots(figsize=SIZE)
    _bands(axes, rows, lambda row: math.sqrt(row["first"] * row["last"]), "nll")
    axes.set_xlabel("position in the window (tokens of context)")
    axes.set_ylabel("loss (nats a token)")
    return figure


def entropy(rows: Sequence[Row]) -> Any:
    """Entropy of attention by the number of visible keys, a line with its quartiles for each arm."""
    figure, axes = plt.subplots(figsize=SIZE)
    _bands(axes, rows, lambda row: float(row["keys"]), "mean")
    axes.set_xlabel("visible keys")
    axes.set_ylabel("entropy of attention (nats)")
    return figure


def cost(rows: Sequence[Row]) -> Any:
    """What each arm loses above another by length, with 95% intervals."""
    pairs = list(dict.fromkeys((row["arm"], row["above"]) for row in rows))
    series = {
        f"{arm} above {above}": [row for row in rows if (row["arm"], row["above"]) == (arm, above)]
        for arm, above in pairs
    }
    figure, axes = plt.subplots(figsize=SIZE)
    _points(axes, series, dict(zip(series, _COST_LOOKS, strict=False)), "length")
    axes.set_xlabel("tokens of a window")
    axes.set_ylabel("cost (nats a token)")
    return figure


def induction(rows: Sequence[Row]) -> Any:
    """What the first of two equal spans brings the second, by the distance between them, with 95% intervals."""
    series = {arm: [row for row in rows if row["arm"] == arm] for arm in _arms(rows)}
    figure, axes = plt.subplots(figsize=SIZE)
    _points(axes, series, {arm: _look(arm) for arm in series}, "distance")
    axes.set_xlabel("distance of the two spans (tokens)")
    axes.set_ylabel("gain (nats a token)")
    return figure


def local_order(rows: Sequence[Row]) -> Any:
    """What the order of neighbours in the context brings, an arm a line, with 95% intervals."""
    figure, axes = plt.subplots(figsize=(SIZE[0], 0.9 + 0.36 * len(rows)))
    _intervals(axes, [(row["arm"], row, _look(row["arm"])) for row in rows])
    axes.set_xlabel("gain (nats a token)")
    return figure


def questions(rows: Sequence[Row]) -> Any:
    """Share of the questions that each arm gets right: kinds by length and depth, a panel an arm."""
    arms, kinds = _arms(rows), list(dict.fromkeys(row["kind"] for row in rows))
    columns = sorted(
        {(row["length"], row["depth"]) for row in rows}, key=lambda c: (c[0], math.inf if c[1] is None else c[1])
    )
    height = 0.34 * len(kinds) + 0.5
    figure, panels = plt.subplots(
        len(arms), 1, figsize=(2.4 + 0.62 * len(columns), height * len(arms) + 0.6), squeeze=False, layout="constrained"
    )
    for arm, axes in zip(arms, panels[:, 0], strict=True):
        right = np.full((len(kinds), len(columns)), np.nan)
        for row in rows:
            if row["arm"] == arm:
                right[kinds.index(row["kind"]), columns.index((row["length"], row["depth"]))] = row["correct"]
        axes.imshow(right, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
        for (y, x), share in np.ndenumerate(right):
            if np.isfinite(share):
                ink = "white" if share < 0.5 else "black"
                axes.text(x, y, f"{100 * share:.0f}%", ha="center", va="center", color=ink, fontsize=9)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_title(arm, fontsize=10, loc="left")
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_xticks(range(len(columns)), [""] * len(columns))
        axes.spines[:].set_visible(False)
    names = [f"{length}\n{'spread' if depth is None else f'at {depth:.0%}'}" for length, depth in columns]
    panels[-1, 0].set_xticks(range(len(columns)), names, fontsize=8)
    panels[-1, 0].set_xlabel("tokens of the context, and where in it the answer stands")
    return figure


def bias(offsets: Sequence[int], tables: Mapping[str, Mapping[str, Any]]) -> Any:
    """The bias by offset, a row for each layer and head: the retrofit's, and where it is known the source's and what
    the one has above the other, all in the same colours."""
    panels = bias_panels(tables)
    layers = [some([name]) for name in tables["retrofit"]]
    edges = np.cumsum([0, *(len(heads) for heads in tables["retrofit"].values())])
    rows = int(edges[-1])
    figure, drawn = plt.subplots(
        1,
        len(panels),
        figsize=(1.4 + 3.1 * len(panels), min(11.0, max(2.6, 1.2 + 0.16 * rows))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    # A few numbers far out must not make the others alike, hence the percentile; the bar's arrows say they are cut.
    reach = max(_percentile(np.abs(panel), 99) for panel in panels.values())
    for axes, (title, panel) in zip(drawn[0], panels.items(), strict=True):
        image = axes.imshow(
            panel, cmap=COLOURS, vmin=-reach, vmax=reach, aspect="auto", interpolation="none", extent=(0, 1, rows, 0)
        )
        axes.hlines(edges[1:-1], 0, 1, color="white", lw=1.2 if rows < 60 else 0.7)
        axes.set_title(title, fontsize=10)
        axes.grid(False)
        shown = np.unique(np.linspace(0, len(offsets) - 1, 7).round().astype(int))
        axes.set_xticks((shown + 0.5) / len(offsets), [f"{offsets[i]}" for i in shown], fontsize=8)
        axes.set_xlabel("offset")
    centres = (edges[:-1] + edges[1:]) / 2
    drawn[0, 0].set_yticks(centres, layers, fontsize=9 if len(layers) < 40 else 6)
    drawn[0, 0].tick_params(axis="y", length=0)
    figure.colorbar(image, ax=list(drawn[0]), extend="both", label="bias, less the head's mean", shrink=0.8, pad=0.02)
    return figure


def bias_panels(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """By title, a matrix with a row for each layer and head. What the source has no table for is NaN in its panels."""
    own = np.concatenate([np.asarray(heads, float) for heads in tables["retrofit"].values()])
    if not tables.get("source"):
        return {"retrofit": own}
    best = np.concatenate(
        [
            np.asarray(tables["source"][name], float) if name in tables["source"] else np.full(np.shape(heads), np.nan)
            for name, heads in tables["retrofit"].items()
        ]
    )
    return {"retrofit": own, "source": best, "retrofit less source": own - best}


def coverage(share: Sequence[float], trained_pairs: Sequence[int] | None) -> Any:
    """Share of the pairs in each bucket and, where that is known, how many pairs trained it; crosses where none did."""
    figure, panels = plt.subplots(
        1 if trained_pairs is None else 2,
        1,
        figsize=(SIZE[0] + 0.8, 2.6 if trained_pairs is None else 4.8),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    above = panels[0, 0]
    above.bar(range(len(share)), [100 * part for part in share], color="#0072B2")
    above.set_ylabel("pairs in it (%)")
    if trained_pairs is not None:
        below = panels[1, 0]
        below.bar(range(len(trained_pairs)), trained_pairs, color="#C44E00")
        if any(trained_pairs):
            below.set_yscale("log")
        never = [bucket for bucket, pairs in enumerate(trained_pairs) if not pairs]
        below.plot(never, [0.04] * len(never), "kx", ms=5, transform=below.get_xaxis_transform(), clip_on=False)
        below.set_ylabel("pairs that trained it")
    panels[-1, 0].set_xlabel("bucket")
    return figure


def factorial(crossings: Sequence[Row]) -> Any:
    """The effects of each crossing with 95% intervals, a panel a crossing, one scale for all."""
    figure, panels = plt.subplots(
        len(crossings),
        1,
        figsize=(SIZE[0] + 1, 0.6 + 1.5 * len(crossings)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    look = _Look("#000000", "-", "o")
    for crossing, axes in zip(crossings, panels[:, 0], strict=True):
        effects = [("positional method", "method"), (crossing["name"], "factor"), ("both together", "both")]
        _intervals(axes, [(name, crossing[effect], look) for name, effect in effects])
        axes.set_title(f"{crossing['name']} crossed with the positional method", fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("effect on the loss (nats a token)")
    return figure


def _arms(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _look(arm: str) -> _Look:
    return _LOOKS.get(arm, _Look("#555555", "-", "v"))


def _drawable(value: float) -> float:
    """NaN in the place of an infinity, which matplotlib would lose the whole axis over."""
    return value if math.isfinite(value) else math.nan


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, percent)) or 1.0 if finite.size else 1.0


def _bands(axes: Any, rows: Sequence[Row], place: Callable[[Row], float], middle: str) -> None:
    """A line for each arm on a log axis of positions, with the band between ``low`` and ``high``."""
    ends = []
    log2_positions(axes)
    longest = max((row.get("length", 0) for row in rows), default=0)
    for arm in _arms(rows):
        own, look = [row for row in rows if row["arm"] == arm], _look(arm)
        x = [place(row) for row in own]
        y = [_drawable(row[middle]) for row in own]
        low, high = ([_drawable(row[bound]) for row in own] for bound in ("low", "high"))
        axes.plot(x, y, color=look.colour, ls=look.dash, marker=look.marker, ms=4, lw=1.6)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.13, lw=0)
        for bound in (low, high):
            axes.plot(x, bound, color=look.colour, ls=look.dash, lw=0.5)
        size = own[-1].get("length", longest)
        ends.append((arm if size == longest else f"{arm} ({size} tokens)", x[-1], y[-1], look.colour))
    _name_ends(axes, ends)


def _points(axes: Any, series: Mapping[str, Sequence[Row]], looks: Mapping[str, _Look], place: str) -> None:
    """A line with intervals for each series over evenly spaced sizes, its points beside those of the others."""
    sizes = sorted({row[place] for rows in series.values() for row in rows})
    ends = []
    for number, (name, rows) in enumerate(series.items()):
        look = looks.get(name, _Look("#555555", "-", "v"))
        aside = 0.09 * (number - (len(series) - 1) / 2)  # so that intervals do not lie on one another
        x = [sizes.index(row[place]) + aside for row in rows]
        y = [_drawable(row["mean"]) for row in rows]
        axes.plot(x, y, color=look.colour, ls=look.dash, lw=1.3)
        for at, row in zip(x, rows, strict=True):
            _interval(axes, at, row, look)
        ends.append((name, x[-1], y[-1], look.colour))
    axes.axhline(0, color="grey", lw=0.8)
    axes.xaxis.set_major_locator(FixedLocator(range(len(sizes))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{size}" for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    _name_ends(axes, ends)


def _interval(axes: Any, at: float, row: Row, look: _Look, across: bool = False) -> None:
    """A mean with its interval; the marker is filled where the difference is real."""
    mean, low, high = (_drawable(row[key]) for key in ("mean", "low", "high"))
    # An interval of paired items need not hold the mean after rounding: matplotlib refuses lengths below zero.
    reach = [[max(0.0, mean - low)], [max(0.0, high - mean)]] if math.isfinite(low) and math.isfinite(high) else None
    place = {"x": mean, "y": at, "xerr": reach} if across else {"x": at, "y": mean, "yerr": reach}
    filling = look.colour if row["real"] else "white"
    axes.errorbar(
        **place, color=look.colour, marker=look.marker, ms=6, mfc=filling, ls="none", capsize=3, lw=1.3, zorder=3
    )


def _intervals(axes: Any, rows: Sequence[tuple[str, Row, _Look]]) -> None:
    """Named means with their intervals, one below the other, the number beside each."""
    for number, (_, row, look) in enumerate(rows):
        _interval(axes, number, row, look, across=True)
        axes.annotate(
            f"{row['mean']:+.3f}", (1.02, number), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9
        )
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _name_ends(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the right edge beside lines that end at (x, y), moved apart where they would lie on one another."""
    ends = sorted((end for end in ends if math.isfinite(end[2])), key=lambda end: end[2])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    least, ceiling = 0.075, 1.0
    heights: list[float] = []
    for *_, y, _ in ends:
        wanted = (y - low) / (high - low)
        heights.append(max(wanted, heights[-1] + least) if heights else wanted)
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], ceiling)
        ceiling = heights[number] - least
    for (name, x, y, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5},
        )
