"""The recommendation on random tables: any losses, any of the differences real; what it states must hold."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rpb_retrofit.comparison.candidates import Candidate, Constraints, Figures
from rpb_retrofit.comparison.recommend import Recommendation, recommend
from tests.comparison.planted import arm, figures


def rounded(low: int, high: int, unit: float, exact: bool) -> st.SearchStrategy[float]:
    """Numbers in steps of ``unit``, as they are printed, or a little beside them."""
    beside = st.just(0.0) if exact else st.sampled_from([0.0, -0.3, 0.2, 0.45])
    return st.builds(lambda steps, off: round((steps + off) * unit, 6), st.integers(low, high), beside)


@st.composite
def tables(draw: st.DrawFn, exact: bool = False) -> Figures:
    count = draw(st.integers(1, 6))
    losses = draw(st.lists(rounded(2000, 2300, 0.001, True), min_size=count, max_size=count, unique=True))
    candidates = [
        arm(
            f"arm {index}",
            loss,
            draw(st.none() | rounded(-5, 40, 0.001, exact)),
            draw(st.none() | rounded(90, 140, 0.01, exact)),
            draw(st.sampled_from([0, 1000, 2000])),
            broken=draw(st.sampled_from([None, None, None, "broken"])),
        )
        for index, loss in enumerate(losses)
    ]
    table = figures(*candidates, sight=0.0)
    real = draw(st.lists(st.booleans(), min_size=len(table.differences), max_size=len(table.differences)))
    drawn = {
        pair: replace(d, p=0.0 if r else 1.0) for (pair, d), r in zip(table.differences.items(), real, strict=True)
    }
    return replace(table, differences=drawn)


def limits(exact: bool = False) -> st.SearchStrategy[Constraints]:
    return st.builds(
        Constraints,
        st.none() | rounded(85, 145, 0.01, exact),
        st.sampled_from([None, 0, 999, 1000, 5000]),
        st.none() | rounded(1, 45, 0.001, exact),
    )


VALUES = {
    "max_slowdown": lambda c: c.slowdown,
    "train_tokens": lambda c: c.tokens,
    "must_keep": lambda c: c.kept.mean if c.kept else 0.0,
}


def meets(candidate: Candidate, constraints: Constraints) -> bool:
    if candidate.broken:
        return False
    bounds = asdict(constraints)
    values = {field: value(candidate) for field, value in VALUES.items()}
    return all(bound is None or (values[f] is not None and values[f] <= bound) for f, bound in bounds.items())


def beats(table: Figures, a: str | None, b: str | None) -> bool:
    """Whether ``a`` is really better than ``b``, or than nothing."""
    if a is None or b is None:
        return a is not None
    loss = {c.name: c.loss for c in table.candidates}
    shown = table.differences.get((a, b)) or table.differences[b, a]
    return shown.real and loss[a] < loss[b]


def thresholds(advice: Recommendation, word: str) -> dict[str, tuple[float, str]]:
    """The values that the answer states, by constraint, and who is said to be taken there."""
    stated = {}
    for change in advice.changes:
        if match := re.match(rf"{word} --(\S+) (\S+), (.+?) is taken", change):
            stated[match[1].replace("-", "_")] = float(match[2].replace(",", "")), match[3]
    return stated


@given(tables(), limits())
def test_the_choice_is_admissible_and_never_really_beaten(table: Figures, constraints: Constraints) -> None:
    advice = recommend(table, constraints)
    able = [c.name for c in table.candidates if meets(c, constraints)]
    assert (advice.choice is None) == (not able) == bool(advice.failures)
    assert set(advice.rejected) == {c.name for c in table.candidates} - set(able)
    assert all(advice.rejected.values())
    if advice.choice is not None:
        assert advice.choice in able
        assert not any(beats(table, other, advice.choice) for other in able if other != advice.choice)
        assert (advice.runner_up is None) == (len(able) == 1)
        assert advice.runner_up != advice.choice


@given(tables(), limits(), st.sampled_from(list(VALUES)))
def test_dropping_a_constraint_never_ends_in_a_worse_one(table: Figures, constraints: Constraints, field: str) -> None:
    before = recommend(table, constraints).choice
    after = recommend(table, replace(constraints, **{field: None})).choice
    assert before is None or after is not None
    assert before in (None, after) or not beats(table, before, after)


@given(tables(), limits())
def test_stated_thresholds_change_the_answer_as_stated(table: Figures, constraints: Constraints) -> None:
    advice = recommend(table, constraints)
    for field, (value, name) in thresholds(advice, "At").items():
        assert value > getattr(constraints, field)
        then = recommend(table, replace(constraints, **{field: value})).choice
        assert then == name and beats(table, name, advice.choice)
    for field, (value, name) in thresholds(advice, "Below").items():
        then = recommend(table, replace(constraints, **{field: math.nextafter(value, 0)})).choice
        assert (then or "nothing") == name != advice.choice


@settings(max_examples=200)
@given(tables(exact=True), limits(exact=True))
def test_stated_thresholds_are_the_nearest_and_none_is_missed(table: Figures, constraints: Constraints) -> None:
    advice = recommend(table, constraints)
    relaxed, tightened = thresholds(advice, "At"), thresholds(advice, "Below")
    for field, value in VALUES.items():
        bound = getattr(constraints, field)
        steps = sorted({v for c in table.candidates if (v := value(c)) is not None and v > 0})
        ends = [
            (step, then)
            for step in steps
            if bound is not None and step > bound
            for then in [recommend(table, replace(constraints, **{field: step})).choice]
            if then not in (None, advice.choice) and beats(table, then, advice.choice)
        ]
        assert relaxed.get(field) == (ends[0] if ends else None)
        chosen = next((c for c in table.candidates if c.name == advice.choice), None)
        if chosen is None or value(chosen) is None:
            assert field not in tightened
            continue
        ends = [
            (step, then or "nothing")
            for step in steps
            if bound is None or step <= bound
            for then in [recommend(table, replace(constraints, **{field: math.nextafter(step, 0)})).choice]
            if then != advice.choice
        ]
        expected = ends[-1] if ends and not (bound is None and ends[-1][1] == "nothing") else None
        assert tightened.get(field) == expected
