"""Names in a picture beside what they name, moved apart where they would lie on one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpb_retrofit.pages.drawing import Label

Box = NDArray[np.float64]
"""The left, lower, right and upper edge of a box, or a point."""

LINE = 13.7
"""Points from one name to the next at the ends of lines."""


def name_ends(axes: Any, labels: Sequence[Label]) -> None:
    """Names at the right edge beside lines that end at (x, y)."""
    labels = sorted((label for label in labels if math.isfinite(label.y)), key=lambda label: label.y)
    axes.set_ylim(axes.get_ylim())
    to_share = axes.transData + axes.transAxes.inverted()
    least = LINE * axes.figure.dpi / 72 / axes.get_window_extent().height
    ceiling = 1.0
    heights: list[float] = []
    for label in labels:
        wanted = float(to_share.transform((label.x, label.y))[1])
        heights.append(max(wanted, heights[-1] + least) if heights else wanted)
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], ceiling)
        ceiling = heights[number] - least
    for label, height in zip(labels, heights, strict=True):
        line = {"arrowstyle": "-", "color": label.style.colour, "lw": 0.5}
        axes.annotate(
            label.name,
            (label.x, label.y),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=label.style.colour,
            arrowprops={**line, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5},
        )


def name_points(axes: Any, labels: Sequence[Label]) -> None:
    """Names beside single points (x, y), where they hide the least; those farther away with a line to their points.

    What they must not hide are the points and each other, and if they can help it the lines that the picture has so
    far, whose limits stay as they are from here on. Thin ones are placed last.
    """
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    renderer, scale = axes.figure.canvas.get_renderer(), 72 / axes.figure.dpi
    named = [label for label in labels if math.isfinite(label.x + label.y)]
    points = [scale * axes.transData.transform((label.x, label.y)) for label in named]
    busy, lines = [_around(point, 4) for point in points], np.array(_inked(axes, scale)).reshape(-1, 4)
    for label, point in sorted(zip(named, points, strict=True), key=lambda pair: pair[0].style.thin):
        text = axes.annotate(
            label.name,
            (label.x, label.y),
            (0, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=8 if label.style.thin else 9,
            color=label.style.colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
        shape = text.get_window_extent(renderer)
        frame, hidden = scale * axes.get_window_extent().extents, np.array(busy)
        places = [
            _Placement(point, scale * shape.width, scale * shape.height, away, turn)
            for away in _AWAY
            for turn in _TURNS
        ]
        costs = [
            100 * place.leaves(frame) + 10 * place.hides(hidden) + place.hides(lines) + place.away / 10
            for place in places
        ]
        place = places[int(np.argmin(costs))]
        busy += place.boxes
        text.set_position(tuple(place.boxes[0][:2] - point))
        if place.away > _AWAY[0]:
            axes.annotate(
                "",
                (label.x, label.y),
                tuple(place.foot - point),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": label.style.colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 4},
            )


_AWAY = (7, 13, 20, 28, 38, 50, 64, 80, 98)
"""Points from what is named to its name."""

_TURNS = (0, 180, 25, -25, 155, -155, 50, -50, 130, -130, 75, -75, 105, -105)
"""Degrees at which a name may stand, the best first."""


class _Placement:
    """Where a name could stand, in points: its box, that of the line to it, and the line's foot."""

    def __init__(self, point: Box, width: float, height: float, away: float, turn: float) -> None:
        self.away = away
        aside = np.array([math.cos(math.radians(turn)), math.sin(math.radians(turn))])
        self.foot = point + away * aside
        left, low = self.foot - (0 if aside[0] > 0 else width, height / 2)
        line = [_around(point + share * (self.foot - point), 0.5) for share in np.linspace(0.3, 1, 8)]
        self.boxes = [np.array([left, low, left + width, low + height]), *(line if away > _AWAY[0] else [])]

    def hides(self, busy: Box) -> int:
        """How often it would lie on one of the boxes ``busy`` (n, 4)."""
        own = np.array(self.boxes)[:, None]
        return int(((own[..., :2] < busy[:, 2:]).all(-1) & (own[..., 2:] > busy[:, :2]).all(-1)).sum())

    def leaves(self, frame: Box) -> bool:
        """Whether the name would not be within the picture."""
        return bool((self.boxes[0][:2] < frame[:2]).any() or (self.boxes[0][2:] > frame[2:]).any())


def _inked(axes: Any, scale: float) -> list[Box]:
    """Small boxes along every line of a picture, bars of intervals too, in points."""
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    for bars in axes.collections:
        paths += [bars.get_transform().transform_path(path) for path in bars.get_paths()]
    boxes = []
    for path in paths:
        corners = scale * path.vertices[np.isfinite(path.vertices).all(-1)]
        for start, end in pairwise(corners):
            steps = max(1, int(np.abs(end - start).max() / 3))
            boxes += [_around(start + step / steps * (end - start), 1) for step in range(steps + 1)]
    return boxes


def _around(point: Box, reach: float) -> Box:
    return np.concatenate([point - reach, point + reach])
