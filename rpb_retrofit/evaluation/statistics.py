"""What a difference between two models is worth: both read the same items, and items of one text are not independent.

Items are grouped into *clusters* (documents, or windows of one document); the differences are summed within each, and
only the spread between clusters counts. "No difference found" is never "no difference": each comparison says the
smallest one that it would have found with a probability of 80%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.05
"""How often a comparison of equals may be called different."""

POWER = 0.8
"""With which probability the smallest detectable difference is found."""

RESAMPLES = 2000

FEWEST = 6
"""Clusters from which on they are resampled; of fewer, Student's interval is all that can be had."""

_FEWEST = 6
"""Discordant items below which McNemar's test cannot reach the 5% level."""


@dataclass(frozen=True)
class Difference:
    """A mean paired difference ``b - a`` in the unit of what was measured.

    ``low`` and ``high`` bound it with 95% confidence. ``p`` is the probability of a difference at least so large
    between equals; `controlled` replaces it by one that accounts for how many were asked. ``detectable`` is the
    smallest true difference that a sample with this spread finds with a probability of 80%.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float
    items: int
    clusters: int

    @property
    def real(self) -> bool:
        """Whether it is more than chance, at the 5% level."""
        return self.p < LEVEL

    @property
    def interval(self) -> str:
        """The mean and its bounds in words."""
        if np.isinf(self.high - self.low):
            return f"{self.mean:+.3f} (no interval: the text is one cluster)"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def __str__(self) -> str:
        if self.real or np.isinf(self.detectable):
            return self.interval
        return f"{self.interval}: no difference found, of {self.detectable:.3f} or more"


def paired(
    differences: Sequence[float], clusters: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0
) -> Difference:
    """The mean of ``differences``, weighted (tokens, say), with its uncertainty over ``clusters``, one number an item.

    The mean is a ratio of sums over clusters. Its interval is the percentile bootstrap over clusters, its level
    widened as Student's t is wider than the normal (Hesterberg, arXiv:1411.5279, section 5.3), since there may be few
    of them, and with very few is Student's; its p comes from Student's t of the linearised cluster sums, with one
    degree of freedom fewer than clusters. Two clusters are needed: with fewer nothing is known of the spread, the
    interval is infinite and p is 1.
    """
    values, groups = np.asarray(differences, float), np.unique(np.asarray(clusters), return_inverse=True)[1]
    weight = np.ones_like(values) if weights is None else np.asarray(weights, float)
    total = np.bincount(groups, values * weight).astype(float)
    share = np.bincount(groups, weight).astype(float)
    mean, count = total.sum() / share.sum(), len(total)
    if count < 2:
        return Difference(float(mean), -np.inf, np.inf, 1.0, np.inf, len(values), count)
    error, free = _standard_error(total, share), count - 1
    tail = stats.norm.sf(np.sqrt(count / free) * stats.t.ppf(1 - LEVEL / 2, free))
    spread = np.ptp(total - mean * share) > 0
    low = high = mean
    if spread and count < FEWEST:
        reach = stats.t.ppf(1 - LEVEL / 2, free) * error
        low, high = mean - reach, mean + reach
    elif spread:
        low, high = stats.bootstrap(
            (total, share),
            lambda t, s, axis: t.sum(axis) / s.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            confidence_level=1 - 2 * tail,
            n_resamples=max(RESAMPLES, int(10 / tail)),
            batch=1000,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    p = 2 * stats.t.sf(abs(mean) / error, free) if error > 0 else float(mean == 0)
    detectable = (stats.t.ppf(1 - LEVEL / 2, free) + stats.t.ppf(POWER, free)) * error
    return Difference(float(mean), float(low), float(high), float(p), float(detectable), len(values), count)


def _standard_error(total: NDArray[np.float64], share: NDArray[np.float64]) -> float:
    count, mean = len(total), total.sum() / share.sum()
    residual = (total - mean * share) / share.mean()
    return float(np.sqrt((residual**2).sum() / (count - 1) / count))


def proportions(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """The share of items that ``b`` gets right less that of ``a``, with McNemar's exact test.

    Only the items that one of them gets right (the discordant ones) count for the test. ``detectable`` is exact for as
    many of them as there are, and for no fewer than the test needs to be able to find anything.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    items, gained, lost = len(first), int((second & ~first).sum()), int((first & ~second).sum())
    discordant, mean = gained + lost, (gained - lost) / len(first)
    p = stats.binomtest(gained, discordant).pvalue if discordant else 1.0
    reach = stats.norm.ppf(1 - LEVEL / 2) * np.sqrt(max(discordant - (gained - lost) ** 2 / items, 1)) / items
    counted = max(discordant, _FEWEST)
    needed = stats.binom.isf(LEVEL / 2, counted, 0.5) + 1
    share = stats.beta.ppf(POWER, needed, counted - needed + 1)  # of the discordant ones that one model must win
    detectable = min(1.0, counted * (2 * share - 1) / items)
    return Difference(mean, max(-1.0, mean - reach), min(1.0, mean + reach), float(p), float(detectable), items, items)


def controlled(differences: Sequence[Difference]) -> list[Difference]:
    """The same comparisons, each ``p`` adjusted for how many were asked at once (Benjamini and Hochberg).

    Of those called real then, 5% are none on average; where all are none, the chance that any is called real is 5%.
    """
    if not differences:
        return []
    adjusted = stats.false_discovery_control([difference.p for difference in differences], method="bh")
    return [replace(difference, p=float(p)) for difference, p in zip(differences, adjusted, strict=True)]
