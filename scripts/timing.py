"""Timing as a shared machine allows it: in random turns, so that what disturbs one arm disturbs all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm


class Timing(NamedTuple):
    """Seconds: the quartiles of some runs; and how many they were."""

    low: float
    median: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:10.1f}{f'{1e3 * self.low:.1f} to {1e3 * self.high:.1f}':>20}"


def in_turns(
    arms: Mapping[str, Callable[[], object]], seconds: float, least: int = 3
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Run every arm once untimed, then all of them in random order, round after round, until ``seconds`` are over.

    At least ``least`` rounds. Returns the timings, and the medians over the rounds of each arm's ratio to the first
    arm: a ratio within one round is disturbed least.
    """
    for run in arms.values():
        run()
    order, shuffle = list(arms), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in order}
    first, start = order[0], time.perf_counter()
    with tqdm(total=seconds, unit="s", leave=False, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}|") as bar:
        while len(times[first]) < least or time.perf_counter() - start < seconds:
            shuffle(order)
            for name in order:
                bar.set_description(name)
                begin = time.perf_counter()
                arms[name]()
                times[name].append(time.perf_counter() - begin)
            bar.n = min(seconds, time.perf_counter() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(arm_times, times[first], strict=True))
        for name, arm_times in times.items()
    }
    return {name: _quartiles(arm_times) for name, arm_times in times.items()}, ratios


def _quartiles(seconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4)
    return Timing(low, median, high, len(seconds))


def kilobytes(file: str, key: str) -> float:
    """A field of Linux' own books, such as VmHWM in /proc/self/status."""
    return next(float(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(key))


def forget_peak() -> None:
    """Let this process' peak memory, VmHWM, begin here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
