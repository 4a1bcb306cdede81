"""The pictures of a diagnosis, from its figures as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.pages.drawing import COLOURS, LINE_STYLES, OTHER, SIZE, LineStyle, Row, arms_of, bands, listed, points
from rpb_retrofit.pages.labels import name_ends

_STYLES = dict(zip(("source", "retrofit", "control", "untrained"), LINE_STYLES, strict=False))
"""How an arm is drawn, in every picture."""

_COST_STYLES = [LINE_STYLES[i] for i in (1, 2, 0, 3, 4)]
"""How a cost is drawn, by its place among the pairs of arms that are compared."""


def loss_by_position(rows: Sequence[Row]) -> Any:
    """Loss by position in the window, a line with its 95% band for each arm."""
    figure, axes = plt.subplots(figsize=SIZE)
    name_ends(axes, bands(axes, rows, _STYLES, lambda row: math.sqrt(row["first"] * row["last"]), "nll"))
    axes.set_xlabel("position in the window (tokens of context)")
    axes.set_ylabel("loss (nats a token)")
    return figure


def entropy(rows: Sequence[Row]) -> Any:
    """Entropy of attention by the number of visible keys, a line with its quartiles for each arm."""
    figure, axes = plt.subplots(figsize=SIZE)
    name_ends(axes, bands(axes, rows, _STYLES, lambda row: float(row["keys"]), "mean"))
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
    ends = points(axes, series, dict(zip(series, _COST_STYLES, strict=False)), "length")
    axes.axhline(0, color="grey", lw=0.8)
    name_ends(axes, ends)
    axes.set_xlabel("tokens of a window")
    axes.set_ylabel("cost (nats a token)")
    return figure


def induction(rows: Sequence[Row]) -> Any:
    """What the first of two equal spans brings the second, by the distance between them, with 95% intervals."""
    series = {arm: [row for row in rows if row["arm"] == arm] for arm in arms_of(rows)}
    figure, axes = plt.subplots(figsize=SIZE)
    ends = points(axes, series, _STYLES, "distance")
    axes.axhline(0, color="grey", lw=0.8)
    name_ends(axes, ends)
    axes.set_xlabel("distance of the two spans (tokens)")
    axes.set_ylabel("gain (nats a token)")
    return figure


def local_order(rows: Sequence[Row]) -> Any:
    """What the order of neighbours in the context brings, an arm a line, with 95% intervals."""
    figure, axes = plt.subplots(figsize=(SIZE[0], 0.9 + 0.36 * len(rows)))
    listed(axes, [(row["arm"], row, _STYLES.get(row["arm"], OTHER)) for row in rows])
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_xlabel("gain (nats a token)")
    return figure


def bias(offsets: Sequence[int], tables: Mapping[str, Mapping[str, Any]]) -> Any:
    """The bias by offset, a row for each layer and head: the retrofit's, and where it is known the source's and what
    the one has above the other, all in the same colours."""
    panels = bias_panels(tables)
    layers = [name_layers([name]) for name in tables["retrofit"]]
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
    look = LineStyle("#000000", "-", "o")
    for crossing, axes in zip(crossings, panels[:, 0], strict=True):
        effects = [("positional method", "method"), (crossing["name"], "factor"), ("both together", "both")]
        listed(axes, [(name, crossing[effect], look) for name, effect in effects])
        axes.axvline(0, color="grey", lw=0.8)
        axes.set_title(f"{crossing['name']} crossed with the positional method", fontsize=10, loc="left")
    panels[-1, 0].set_xlabel("effect on the loss (nats a token)")
    return figure


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    finite = values[np.isfinite(values)]
    return float(np.percentile(finite, percent)) or 1.0 if finite.size else 1.0
