"""How often the statistics are wrong: simulated comparisons whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rpb_retrofit.evaluation.statistics import LEVEL, POWER, controlled, paired, proportions

ROUNDS = 200


def simulate(rng: np.random.Generator, clusters: int, each: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Differences of items whose documents differ among themselves, heavy-tailed as losses are."""
    group = np.repeat(np.arange(clusters), each)
    document = rng.normal(0, 0.5, clusters)[group]
    return effect + document + rng.standard_t(5, len(group)), group


@pytest.mark.parametrize("clusters", [5, 12, 40])
def test_false_alarms_and_coverage(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    alarms, covered = 0, 0
    for _ in range(ROUNDS):
        comparison = paired(*simulate(rng, clusters, 10, 0.0))
        alarms += comparison.real
        covered += comparison.low <= 0 <= comparison.high
    # A rate of 5% gives more than this once in a thousand runs of the test.
    most = stats.binom.ppf(0.999, ROUNDS, LEVEL)
    assert alarms <= most
    assert ROUNDS - covered <= most


@pytest.mark.parametrize("clusters", [5, 12, 40])
def test_power_at_the_stated_smallest_effect(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    detected = 0
    for _ in range(ROUNDS):
        null, group = simulate(rng, clusters, 10, 0.0)
        detected += paired(null + paired(null, group).detectable, group).real
    assert detected >= stats.binom.ppf(0.001, ROUNDS, POWER)
    assert detected <= stats.binom.ppf(0.999, ROUNDS, 0.9)  # and what is stated is not far too large


def test_clusters_count_not_items() -> None:
    """Copies of the items of five documents say nothing new."""
    rng = np.random.default_rng(0)
    values, group = simulate(rng, 5, 10, 0.0)
    once, often = paired(values, group), paired(np.tile(values, 20), np.tile(group, 20))
    assert often.clusters == 5 and often.items == 1000
    assert often.p == pytest.approx(once.p) and often.detectable == pytest.approx(once.detectable)
    alone = paired(values, range(len(values)))
    assert alone.clusters == 50 and alone.detectable < once.detectable


def test_weights_are_repetitions() -> None:
    weighted = paired([1.0, 2.0, 4.0], [0, 1, 2], [1, 3, 2])
    repeated = paired([1.0, 2.0, 2.0, 2.0, 4.0, 4.0], [0, 1, 1, 1, 2, 2])
    assert weighted.mean == pytest.approx(15 / 6) == repeated.mean
    assert weighted.p == pytest.approx(repeated.p)


def test_p_is_students_where_clusters_are_equal() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 9)
    assert paired(values, range(9)).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_one_cluster_says_nothing() -> None:
    comparison = paired([0.5, 0.6], [7, 7])
    assert not comparison.real and comparison.p == 1 and comparison.detectable == np.inf


def test_no_spread() -> None:
    assert not paired([0.0, 0.0, 0.0], [0, 1, 2]).real
    same = paired([0.5, 0.5, 0.5], [0, 1, 2])
    assert same.real and same.low == same.high == pytest.approx(0.5)


def test_mcnemar() -> None:
    a = [True] * 30 + [False] * 10
    b = [True] * 18 + [False] * 12 + [True] * 2 + [False] * 8
    comparison = proportions(a, b)
    assert comparison.mean == pytest.approx(-0.25)
    assert comparison.p == pytest.approx(stats.binomtest(2, 14).pvalue) and comparison.real
    assert comparison.low < -0.25 < comparison.high < 0
    assert not proportions(a, a).real and proportions(a, a).mean == 0 and proportions(a, a).detectable > 0


def test_mcnemar_false_alarms_and_power() -> None:
    rng, alarms, hits, items, discordant = np.random.default_rng(3), 0, 0, 60, 20
    first = np.arange(items) < 30
    for _ in range(ROUNDS):
        wins = rng.random(discordant) < 0.5
        a = np.where(np.arange(items) < discordant, ~np.pad(wins, (0, items - discordant)), first)
        b = np.where(np.arange(items) < discordant, np.pad(wins, (0, items - discordant)), first)
        comparison = proportions(a, b)
        alarms += comparison.real
        share = (1 + comparison.detectable * items / discordant) / 2
        wins = np.pad(rng.random(discordant) < share, (0, items - discordant))
        discord = np.arange(items) < discordant
        hits += proportions(np.where(discord, ~wins, first), np.where(discord, wins, first)).real
    assert alarms <= stats.binom.ppf(0.999, ROUNDS, LEVEL)
    assert hits >= stats.binom.ppf(0.001, ROUNDS, POWER)


def test_many_comparisons_are_controlled() -> None:
    rng, families = np.random.default_rng(4), 0
    for _ in range(100):
        comparisons = [paired(*simulate(rng, 8, 4, 0.0)) for _ in range(10)]
        families += any(difference.real for difference in controlled(comparisons))
    assert families <= stats.binom.ppf(0.999, 100, LEVEL)
    assert controlled([]) == []


def test_one_cluster_has_no_interval() -> None:
    alone, two = paired([0.1, 0.3], [0, 0]), paired([0.1, 0.3], [0, 1])
    assert str(alone) == "+0.200 (no interval: the text is one cluster)" and not alone.real
    assert str(two).startswith("+0.200 (") and "no difference found, of" in str(two)
