"""The recommendation on planted figures: the right one, with all that it says of it."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from typing import Any

import pytest

from rpb_retrofit.comparison.candidates import Candidate, Constraints, Figures
from rpb_retrofit.comparison.recommend import CLEARLY, recommend
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.statistics import Difference
from tests.comparison.planted import TARGET, arm, difference, figures

SOURCE = arm("rope", 3.0, None)
ARMS = figures(
    SOURCE,
    arm("yarn", 2.6, 0.03, 1.01),
    arm("t5", 2.5, 0.01, 1.3),
    arm("yarn healed", 2.4, 0.005, 1.01, 100_000, retrieval=0.75, memory=1.1),
    arm("t5 healed", 2.2, 0.001, 1.3, 100_000),
    arm("alibi", 1.0, slowdown=2.0, broken="does not run at 16384 tokens: killed"),
    arm("nope", math.nan, broken="its logits are no numbers"),
)


@pytest.mark.parametrize(
    ("constraints", "choice", "runner_up"),
    [
        ({}, "t5 healed", "yarn healed"),
        ({"max_slowdown": 1.05}, "yarn healed", "yarn"),
        ({"max_slowdown": 1.3}, "t5 healed", "yarn healed"),
        ({"max_slowdown": 1.0}, "rope", None),
        ({"train_tokens": 99_999}, "t5", "yarn"),
        ({"train_tokens": 100_000}, "t5 healed", "yarn healed"),
        ({"must_keep": 0.0}, "rope", None),
        ({"must_keep": 0.001}, "t5 healed", "rope"),
        ({"max_slowdown": 1.05, "must_keep": 0.02}, "yarn healed", "rope"),
        ({"max_slowdown": 1.05, "train_tokens": 0}, "yarn", "rope"),
        ({"train_tokens": 0, "must_keep": 0.02}, "t5", "rope"),
        ({"max_slowdown": 1.05, "train_tokens": 0, "must_keep": 0.02}, "rope", None),
        ({"max_slowdown": 2.0, "train_tokens": 10**9, "must_keep": 1.0}, "t5 healed", "yarn healed"),
    ],
)
def test_the_lowest_that_meets_all_constraints(constraints: dict[str, Any], choice: str, runner_up: str | None) -> None:
    advice = recommend(ARMS, Constraints(**constraints))
    assert (advice.choice, advice.runner_up) == (choice, runner_up)
    assert choice in advice.headline and f"{TARGET:,} tokens" in advice.headline
    assert not advice.failures
    assert advice.rejected["alibi"] == "does not run at 16384 tokens: killed"


TWIN, LATE = arm("twin", 2.5, slowdown=1.2), arm("late", 2.49, slowdown=1.2, tokens=1000)
CLEAR = {"slowdown": 1.2 - 2 * CLEARLY}


@pytest.mark.parametrize(
    ("candidates", "choice", "says"),
    [
        ((replace(SOURCE, loss=2.52), TWIN), "rope", "tied with the lowest, 2.500 of twin, and there is nothing to do"),
        ((replace(SOURCE, loss=2.52), LATE), "rope", "tied with the lowest, 2.490 of late, and there is nothing to do"),
        ((SOURCE, LATE, TWIN), "twin", "tied with the lowest, 2.490 of late, and it needs less training"),
        ((SOURCE, TWIN, arm("quick", 2.53, **CLEAR)), "quick", "tied with the lowest, 2.500 of twin, and it is the f"),
        (
            (SOURCE, TWIN, arm("as quick", 2.49, slowdown=1.21)),
            "as quick",
            "the lowest of those that can be taken, though tied with twin",
        ),
        ((SOURCE, TWIN, arm("untimed", 2.49, slowdown=None)), "twin", "faster one, as far as measured"),
        (
            (SOURCE, replace(TWIN, slowdown=None), arm("untimed", 2.49, slowdown=None)),
            "untimed",
            "though tied with twin",
        ),
        ((SOURCE, LATE, arm("quick", 2.5, tokens=1000, **CLEAR)), "quick", "faster one"),
        ((SOURCE, arm("costly", 2.3, tokens=1000), TWIN), "costly", "the lowest of those that can be taken."),
    ],
)
def test_of_those_that_are_tied_the_least_work(candidates: tuple[Candidate, ...], choice: str, says: str) -> None:
    advice = recommend(figures(*candidates), Constraints())
    assert advice.choice == choice
    assert says in advice.headline
    told = [change for change in advice.changes if change.startswith(f"Tied with {choice}: ")]
    assert len(told) == (says != "the lowest of those that can be taken.")
    assert all("where 0.050 would show" in change for change in told)


def test_tied_with_the_lowest_is_not_enough_where_another_tied_one_is_really_better() -> None:
    """The spread of a noisy arm hides that the source is beaten by a third."""
    table = figures(SOURCE, noisy := arm("noisy", 2.4), sound := arm("sound", 2.5), sight=0.0)
    hidden = {pair: replace(d, p=0.5) for pair, d in table.differences.items() if noisy.name in pair}
    advice = recommend(replace(table, differences={**table.differences, **hidden}), Constraints())
    assert advice.choice == noisy.name and advice.runner_up == sound.name


@pytest.mark.parametrize(
    ("candidates", "constraints", "headline", "last"),
    [
        (
            (replace(SOURCE, kept=difference(0.04, True)), arm("yarn:2", 2.5, 0.031)),
            {"must_keep": 0.02},
            "the nearest to --must-keep 0.02, yarn:2, loses +0.031 (+0.026 to +0.036) nats a token inside the context, "
            "0.011 too much.",
            "Not all constraints can be met: without --must-keep 0.02, yarn:2 is taken.",
        ),
        (
            (SOURCE, arm("t5", 2.5, slowdown=1.3), arm("fast", 2.7, slowdown=0.93)),
            {"max_slowdown": 0.9},
            "the nearest to --max-slowdown 0.9, fast, takes 0.93 times the source's time, 0.03 too much.",
            "Not all constraints can be met: without --max-slowdown 0.9, t5 is taken.",
        ),
        (
            (SOURCE, arm("quick", 2.5, 0.04, 0.8), arm("quicker", 2.5, 0.05, 0.7), arm("true", 2.3, 0.01, 1.3)),
            {"max_slowdown": 0.9, "must_keep": 0.02},
            "the nearest to --max-slowdown 0.9 that meets the rest, rope, takes 1.00 times the source's time, "
            "0.10 too much.",
            "Each constraint can be met, but not all together: without --max-slowdown 0.9, true is taken; "
            "without --must-keep 0.02, quicker is taken.",
        ),
        (
            (replace(SOURCE, tokens=5_000_000), arm("t5", 2.5, 0.04, 0.8, 2_000_000), arm("yarn", 2.5, 0.03, 1.0)),
            {"max_slowdown": 0.9, "must_keep": 0.02, "train_tokens": 1_000_000},
            "the nearest to --max-slowdown 0.9 that meets one of the rest, rope, takes 1.00 times the source's time, "
            "0.10 too much.",
            "Each constraint can be met, but not all together: no single one, dropped, lets anybody in.",
        ),
        (
            (replace(SOURCE, tokens=5_000_000), arm("t5", 2.5, tokens=2_000_000)),
            {"train_tokens": 1_500_000},
            "the nearest to --train-tokens 1,500,000, t5, was trained on 2,000,000 tokens, 500,000 too much.",
            "Not all constraints can be met: without --train-tokens 1,500,000, t5 is taken.",
        ),
        (
            (replace(SOURCE, slowdown=None), arm("t5", 2.5, slowdown=None)),
            {"max_slowdown": 1.05},
            "the nearest to --max-slowdown 1.05, rope, has not been timed, so nothing shows that it is fast enough.",
            "Not all constraints can be met: without --max-slowdown 1.05, t5 is taken.",
        ),
        (
            (replace(SOURCE, broken="does not run"), arm("t5", math.inf)),
            {"max_slowdown": 1.05},
            "no candidate works.",
            "No candidate works.",
        ),
    ],
)
def test_where_nothing_fits_it_says_by_how_much(
    candidates: tuple[Candidate, ...], constraints: dict[str, Any], headline: str, last: str
) -> None:
    advice = recommend(figures(*candidates), Constraints(**constraints))
    assert advice.choice is None and advice.runner_up is None
    assert advice.headline == f"Nothing meets the constraints: {headline}"
    assert advice.failures[0][1:] == headline[1:]
    assert advice.failures[-1] == last
    assert set(advice.rejected) == {c.name for c in candidates}
    assert not advice.reasons and not advice.costs


def test_two_constraints_that_exclude_each_other_are_both_named() -> None:
    table = figures(SOURCE, arm("quick", 2.5, 0.0412, 0.8))
    advice = recommend(table, Constraints(max_slowdown=0.9, must_keep=0.02))
    assert "The nearest to --must-keep 0.02 that meets the rest, quick, " in advice.failures[1]
    assert "0.022 too much" in advice.failures[1]  # rounded up: relaxing by less would not let it in
    assert "At --must-keep 0.042, quick is taken." in advice.changes


def test_a_constraint_that_is_met_is_not_said_to_fail() -> None:
    table = figures(replace(SOURCE, kept=difference(0.04, True)), arm("slow", 2.5, 0.03, 1.3))
    advice = recommend(table, Constraints(max_slowdown=1.05, must_keep=0.02))
    assert [failure.split(",")[0] for failure in advice.failures] == [
        "The nearest to --must-keep 0.02 that meets the rest",
        "Not all constraints can be met: without --must-keep 0.02",
    ]


@pytest.mark.parametrize(("slowdown", "step"), [(1.037, "1.03"), (1.031, "1.03"), (1.03, "1.03"), (1.1, "1.1")])
def test_a_threshold_is_rounded_to_the_side_on_which_it_holds(slowdown: float, step: str) -> None:
    advice = recommend(figures(SOURCE, arm("t5", 2.5, slowdown=slowdown)), Constraints())
    assert f"Below --max-slowdown {step}, rope is taken instead." in advice.changes


def test_all_that_is_said_of_a_choice() -> None:
    advice = recommend(ARMS, Constraints(max_slowdown=1.05, train_tokens=5_000_000, must_keep=0.007))
    assert (
        advice.headline
        == "Take yarn healed: 2.400 nats a token at 16,384 tokens, the lowest of those that can be taken."
    )
    assert advice.reasons == (
        "At 16,384 tokens yarn healed loses 2.400 nats a token; against the source, rope: -0.600 (-0.610 to -0.590).",
        "It takes 1.01 times the source's time.",
        "It loses +0.005 (+0.000 to +0.010) nats a token inside the context, which could be as much as 0.010, "
        "beyond --must-keep 0.007.",
        "It was trained on 100,000 tokens; calibration and training took 40 seconds.",
        "It answers 75% of the retrieval questions right and takes 1.10 times the source's memory, "
        "which the choice does not weigh.",
    )
    assert advice.costs == (
        "--max-slowdown 1.05 costs +0.200 (+0.190 to +0.210) nats a token: without it t5 healed is taken.",
        "--train-tokens 5,000,000 costs nothing: yarn healed is taken without it too.",
        "--must-keep 0.007 costs nothing: yarn healed is taken without it too.",
    )
    assert advice.changes == (
        "Below --max-slowdown 1.01, rope is taken instead.",
        "Below --train-tokens 100,000, rope is taken instead.",
        "Below --must-keep 0.005, rope is taken instead.",
        "At --max-slowdown 1.3, t5 healed is taken: -0.200 (-0.210 to -0.190) nats a token.",
        "More training than the 100,000 tokens measured, up to --train-tokens 5,000,000, may reorder them.",
    )
    assert advice.rejected == {
        "yarn": "--must-keep 0.007: loses +0.030 (+0.025 to +0.035) nats a token inside the context, 0.023 too much",
        "t5": "--max-slowdown 1.05: takes 1.30 times the source's time, 0.25 too much; "
        "--must-keep 0.007: loses +0.010 (+0.005 to +0.015) nats a token inside the context, 0.003 too much",
        "t5 healed": "--max-slowdown 1.05: takes 1.30 times the source's time, 0.25 too much",
        "alibi": "does not run at 16384 tokens: killed",
        "nope": "its logits are no numbers",
    }
    assert asdict(advice)["choice"] == "yarn healed"


def test_source_and_runner_up_are_both_held_against_the_choice() -> None:
    advice = recommend(figures(SOURCE, arm("t5", 2.5), arm("yarn", 2.52)), Constraints())
    assert advice.reasons[0] == (
        "At 16,384 tokens t5 loses 2.500 nats a token; against the runner-up, yarn: "
        "-0.020 (-0.030 to -0.010): no difference found, of 0.050 or more; against the source, rope: "
        "-0.500 (-0.510 to -0.490)."
    )


def test_a_constraint_that_only_costs_a_tie_costs_nothing_that_shows() -> None:
    advice = recommend(figures(SOURCE, TWIN, arm("quick", 2.53, 0.03, **CLEAR)), Constraints(must_keep=0.02))
    assert advice.choice == "twin"
    assert advice.costs == (
        "--must-keep 0.02 costs nothing that this text shows, -0.030 (-0.040 to -0.020): without it quick is taken.",
    )
    assert not any(change.startswith("At ") for change in advice.changes)  # it is not really better


def test_what_was_not_timed_meets_no_bound() -> None:
    table = figures(SOURCE, arm("untimed", 2.0, slowdown=None))
    assert recommend(table, Constraints()).reasons[1].startswith("It has not been timed")
    advice = recommend(table, Constraints(max_slowdown=100))
    assert advice.choice == "rope"
    assert advice.rejected == {
        "untimed": "--max-slowdown 100: has not been timed, so nothing shows that it is fast enough"
    }


def test_one_stretch_of_text_shows_nothing_so_the_source_stays() -> None:
    blind = Difference(-0.5, -math.inf, math.inf, 1.0, math.inf, 16000, 1)
    advice = recommend(Figures(TARGET, (SOURCE, arm("t5", 2.5)), {("rope", "t5"): blind}), Constraints())
    assert advice.choice == "rope"
    assert any("t5 (-0.500, where no difference would show)" in change for change in advice.changes)


@pytest.mark.parametrize("tokens", [None, 1000, 1001])
def test_a_budget_beyond_what_was_measured_is_said(tokens: int | None) -> None:
    advice = recommend(figures(SOURCE, LATE), Constraints(train_tokens=tokens))
    sentence = "More training than the 1,000 tokens measured, up to --train-tokens 1,001, may reorder them."
    assert (sentence in advice.changes) == (tokens == 1001) == any("reorder" in change for change in advice.changes)


def test_differences_are_read_in_either_order() -> None:
    turned = {(b, a): replace(d, mean=-d.mean, low=-d.high, high=-d.low) for (a, b), d in ARMS.differences.items()}
    constraints = Constraints(max_slowdown=1.05, must_keep=0.02)
    assert recommend(ARMS, constraints) == recommend(replace(ARMS, differences=turned), constraints)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_slowdown", 0.0),
        ("max_slowdown", -1.0),
        ("max_slowdown", math.inf),
        ("max_slowdown", math.nan),
        ("train_tokens", -1),
        ("must_keep", -0.01),
        ("must_keep", math.inf),
        ("must_keep", math.nan),
    ],
)
def test_a_constraint_that_means_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^--{field.replace('_', '-')} {re.escape(str(value))}: give [^\n]+$"):
        Constraints(**{field: value})
