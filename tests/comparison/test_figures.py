"""Figures of a comparison from planted losses: positions inside and beyond, seeds, what is held against what."""

from __future__ import annotations

import math

import pytest
import torch

from rpb_retrofit.comparison.candidates import Constraints
from rpb_retrofit.comparison.figures import figures, over_seeds, table
from rpb_retrofit.comparison.measures import ComparisonPlan, Measured
from rpb_retrofit.comparison.result import ComparisonResult
from rpb_retrofit.comparison.run import Comparison, Made, Row
from rpb_retrofit.evaluation.losses import Losses
from rpb_retrofit.evaluation.speed import Seconds, Skipped, SpeedResult

CONTEXT, TARGET, TOKENS = 64, 256, 4096
PLAN = ComparisonPlan(TARGET, (32, CONTEXT, TARGET), TOKENS)


def losses(length: int, inside: float, beyond: float, seed: int = 0, noise: float = 0.3) -> Losses:
    """Losses around two means, for positions up to the context and from it on; the noise is the text's."""
    windows = TOKENS // length
    token = torch.arange(TOKENS).view(windows, length)[:, 1:]
    text = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1))[token] * noise
    own = torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed + 2))[token] * noise / 10
    level = torch.where(torch.arange(1, length) < CONTEXT, inside, beyond)
    return Losses(length, level + text + own, token, torch.zeros(windows, dtype=torch.long))


def measured(inside: float, beyond: float, seed: int = 0, lengths: tuple[int, ...] = PLAN.lengths) -> Measured:
    failed = {str(n): "no memory" for n in PLAN.lengths if n not in lengths}
    return Measured({n: losses(n, inside, beyond, seed) for n in lengths}, [], [], failed)


def row(name: str, *parts: Measured, tokens: int = 0) -> Row:
    return Row(name, f"about {name}", Made("do it", 2.0), list(parts), tokens, 1e-3 if tokens else None, 10.0)


def comparison() -> Comparison:
    rows = [
        row("source", measured(2.0, 5.0)),
        row("better", measured(2.1, 4.0, seed=1)),
        row("short", measured(2.0, 5.0, lengths=(32, CONTEXT))),
        row("source", measured(1.8, 4.5, 2), measured(1.8, 4.5, 3), tokens=100),
        row("better", measured(1.85, 3.5, 4), measured(1.95, 3.9, 5), tokens=100),
    ]
    return Comparison(PLAN, CONTEXT, rows, timed(), {"yarn": "it does not apply"})


def timed() -> dict[str, list[SpeedResult | Skipped]]:
    """A prefill of 1 s and a token of 10 ms for the source, half as much again and twice as much for the other."""

    def took(seconds: float) -> Seconds:
        return Seconds.of([seconds * disturbed for disturbed in (1.0, 3.0, 1.1)])

    own = SpeedResult(128, took(1.0), took(1.01), took(0.01), 1000, 3)
    other = SpeedResult(128, took(1.5), took(1.52), took(0.02), 1500, 3)
    return {"source": [own], "better": [other, Skipped(256, "no memory")]}


def test_rows() -> None:
    measured_rows = {r["id"]: r for r in figures(comparison())["rows"]}
    assert [*measured_rows] == ["source", "better", "short", "source healed", "better healed"]
    better = measured_rows["better"]
    assert better["inside"]["length"] == CONTEXT and better["beyond"]["first"] == CONTEXT
    assert better["inside"]["above"]["mean"] == pytest.approx(0.1, abs=0.02)
    assert better["beyond"]["above"]["mean"] == pytest.approx(-1.0, abs=0.02) and better["beyond"]["above"]["real"]
    assert better["beyond"]["mean"] == pytest.approx(4.0, abs=0.05)
    share = (CONTEXT - 1) / (TARGET - 1)
    whole = next(r for r in better["losses"] if r["length"] == TARGET)
    assert whole["mean"] == pytest.approx(2.1 * share + 4.0 * (1 - share), abs=0.05)
    assert (
        measured_rows["source"]["inside"]["above"] is None and measured_rows["source healed"]["inside"]["above"] is None
    )
    healed = measured_rows["better healed"]
    assert healed["inside"]["above"]["mean"] == pytest.approx(0.1, abs=0.02), "held against the source healed alike"
    assert healed["beyond"]["mean"] == pytest.approx(3.7, abs=0.05) and healed["seeds"] == 2
    assert measured_rows["short"]["broken"] == "at 256 tokens: no memory" and measured_rows["short"]["beyond"] is None
    assert [r["length"] for r in measured_rows["short"]["losses"]] == [32, CONTEXT]
    by_position = {r["first"]: r for r in better["by_position"]}
    assert by_position[128]["nll"] == pytest.approx(4.0, abs=0.1) and by_position[16]["nll"] == pytest.approx(
        2.1, abs=0.2
    )


def test_times_are_held_against_the_sources_of_the_same_round() -> None:
    measured_rows = {r["id"]: r for r in figures(comparison())["rows"]}
    speed, skipped = measured_rows["better"]["speed"]
    assert speed["prefill_over"] == pytest.approx(1.5) and speed["decode_over"] == pytest.approx(2.0)
    assert skipped == {"length": 256, "skipped": "no memory"}
    assert measured_rows["source"]["speed"][0]["prefill_over"] == 1.0
    candidates = {c.name: c for c in table(figures(comparison())).candidates}
    assert candidates["better"].slowdown == pytest.approx(2.0), "the slower of the two"
    assert candidates["better"].memory == 1.5 and candidates["better"].seconds == 12.0
    assert candidates["source"].kept is None and candidates["short"].broken


def test_every_pair_once_and_controlled_together() -> None:
    pairs = figures(comparison())["pairs"]
    names = {frozenset((p["a"], p["b"])) for p in pairs if p["at"] == "target"}
    assert len(names) == 6 == sum(p["at"] == "target" for p in pairs), "the broken row has no loss there"
    assert sum(p["at"] == "inside" for p in pairs) == 10
    (gap,) = (p for p in pairs if p["at"] == "target" and (p["a"], p["b"]) == ("source", "better"))
    assert gap["mean"] == pytest.approx(-1.0, abs=0.02)


def test_seeds_that_disagree_widen_the_interval() -> None:
    """The text says the difference is sure; the seeds say otherwise."""
    part = (TARGET, 2.0, 3.0)
    source = [losses(*part, seed=s) for s in (0, 1, 2)]
    agree = [losses(TARGET, 2.0, 3.1, seed=s) for s in (3, 4, 5)]
    apart = [losses(TARGET, 2.0, 3.0 + gap, seed=s) for s, gap in ((3, 0.5), (4, -0.5), (5, 0.3))]
    assert over_seeds(source, agree).real and over_seeds(source, agree).mean == pytest.approx(0.075, abs=0.01)
    spread = over_seeds(source, apart)
    assert not spread.real and spread.high - spread.low > 1
    alone = over_seeds(source[:1], apart)
    assert alone.mean == pytest.approx(spread.mean, abs=0.01), "an untrained model is the same for every seed"


def test_a_target_within_the_context() -> None:
    plan = ComparisonPlan(32, (16, 32), TOKENS)
    rows = [
        row(name, Measured({n: losses(n, level, 9.0, seed) for n in plan.lengths}, [], []))
        for name, level, seed in (("source", 2.0, 0), ("other", 2.5, 1))
    ]
    document = figures(Comparison(plan, CONTEXT, rows))
    assert document["rows"][1]["beyond"]["first"] == 1
    assert document["rows"][1]["beyond"]["above"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert document["rows"][1]["inside"]["length"] == 32


def test_result() -> None:
    page = ComparisonResult.of(comparison(), Constraints(must_keep=0.2), {"source": "model", "seconds": 1.0}).document
    assert page["recommendation"]["choice"] == "better" or page["recommendation"]["choice"] == "better healed"
    assert page["headline"] == page["recommendation"]["headline"]
    assert page["skipped"] == {"yarn": "it does not apply"} and page["constraints"]["must_keep"] == 0.2
    assert "short" in page["recommendation"]["rejected"]
    assert math.isfinite(page["rows"][0]["beyond"]["mean"])
