"""Which candidate to take under a user's constraints, what they cost, and what would change the answer.

Arithmetic on what was measured. Of the candidates that meet every constraint, those that another one really beats at
the target length are out; the rest are tied, and the one that asks least of the user is taken. So an answer is never
really worse than another admissible one, and relaxing a constraint never makes it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rpb_retrofit.comparison.candidates import Candidate, Constraints, Figures

CLEARLY = 0.02
"""By how many times the source's time one candidate must be faster than another for that to choose between ties."""


@dataclass(frozen=True)
class Recommendation:
    """The answer, in sentences that carry their figures; ``choice`` is None where nothing meets the constraints.

    ``reasons``: the figures of the choice. ``costs``: what each constraint cost. ``changes``: what would change the
    answer. ``failures``: where there is none, who comes nearest. ``rejected``: who fell out, and why.
    """

    choice: str | None
    runner_up: str | None
    headline: str
    reasons: tuple[str, ...]
    costs: tuple[str, ...]
    changes: tuple[str, ...]
    failures: tuple[str, ...]
    rejected: Mapping[str, str]


@dataclass(frozen=True)
class _Limit:
    """One kind of constraint: what of a candidate it bounds, how that is said, and to how many ``digits``."""

    field: str
    digits: int
    value: Callable[[Candidate], float | None]
    says: Callable[[Candidate], str]

    def bound(self, constraints: Constraints) -> float | None:
        return getattr(constraints, self.field)

    def put(self, constraints: Constraints, bound: float | None) -> Constraints:
        changed: dict[str, Any] = {self.field: bound}
        return replace(constraints, **changed)

    def option(self, bound: float | None) -> str:
        return f"--{self.field.replace('_', '-')} {bound:,}"

    def met(self, candidate: Candidate, constraints: Constraints) -> bool:
        """Whether it is shown to be met: what was not measured meets no bound."""
        bound, value = self.bound(constraints), self.value(candidate)
        return bound is None or (value is not None and value <= bound)

    def excess(self, candidate: Candidate, bound: float) -> str:
        """By how much a candidate fails, rounded so that a bound relaxed by as much would let it in."""
        value = self.value(candidate)
        over = "" if value is None else f", {self.up(value) - bound:,.{self.digits}f} too much"
        return f"{self.says(candidate)}{over}"

    def up(self, value: float) -> float:
        rounded = round(value, self.digits)
        return rounded if rounded >= value else round(rounded + 10**-self.digits, self.digits)

    def down(self, value: float) -> float:
        return -self.up(-value)


def _speed(candidate: Candidate) -> str:
    if candidate.slowdown is None:
        return "has not been timed, so nothing shows that it is fast enough"
    return f"takes {candidate.slowdown:.2f} times the source's time"


def _keeping(candidate: Candidate) -> str:
    if candidate.kept is None:
        return "is what the others are held against inside the context"
    return f"loses {candidate.kept.interval} nats a token inside the context"


LIMITS = (
    _Limit("max_slowdown", 2, lambda c: c.slowdown, _speed),
    _Limit("train_tokens", 0, lambda c: c.tokens, lambda c: f"was trained on {c.tokens:,} tokens"),
    _Limit("must_keep", 3, lambda c: 0.0 if c.kept is None else c.kept.mean, _keeping),
)
"""All kinds of constraints, one for each field of `Constraints`."""


def recommend(figures: Figures, constraints: Constraints) -> Recommendation:
    """The candidate to take, with what it rests on. KeyError where two working candidates were not compared."""
    rejected = {c.name: why for c in figures.candidates if (why := _rejection(c, constraints)) is not None}
    pool = _admissible(figures, constraints)
    choice = _best(figures, pool)
    more = (*_relaxed(figures, constraints, choice), *_untried(figures, constraints))
    if choice is None:
        failures = tuple(_failures(figures, constraints))
        first = failures[0]
        headline = f"Nothing meets the constraints: {first[0].lower()}{first[1:]}"
        return Recommendation(None, None, headline, (), (), more, failures, rejected)
    runner_up = _best(figures, [c for c in pool if c is not choice])
    return Recommendation(
        choice.name,
        runner_up.name if runner_up else None,
        _headline(figures, pool, choice, runner_up),
        _reasons(figures, constraints, choice, runner_up),
        tuple(_costs(figures, constraints, choice)),
        (*_tightened(figures, pool, constraints, choice), *more, *_ties(figures, pool, choice)),
        (),
        rejected,
    )


def _given(constraints: Constraints) -> list[tuple[_Limit, float]]:
    return [(limit, bound) for limit in LIMITS if (bound := limit.bound(constraints)) is not None]


def _rejection(candidate: Candidate, constraints: Constraints) -> str | None:
    failed = [(limit, bound) for limit, bound in _given(constraints) if not limit.met(candidate, constraints)]
    why = "; ".join(f"{limit.option(bound)}: {limit.excess(candidate, bound)}" for limit, bound in failed)
    return candidate.fault or why or None


def _admissible(figures: Figures, constraints: Constraints) -> list[Candidate]:
    return [c for c in figures.candidates if _rejection(c, constraints) is None]


def _best(figures: Figures, pool: Sequence[Candidate]) -> Candidate | None:
    """Of those that none of ``pool`` really beats, the one with the least training, work, time and loss, in turn."""
    tied = [c for c in pool if not any(figures.beats(other, c) for other in pool)]
    tied = [c for c in tied if c.tokens == min(c.tokens for c in tied)]
    if figures.source in tied:
        return figures.source
    fastest = min((_or_infinite(c.slowdown) for c in tied), default=math.inf)
    quick = [c for c in tied if _or_infinite(c.slowdown) <= fastest + CLEARLY]
    return min(quick, key=lambda c: c.loss, default=None)


def _taken(figures: Figures, constraints: Constraints) -> Candidate | None:
    return _best(figures, _admissible(figures, constraints))


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _headline(figures: Figures, pool: Sequence[Candidate], choice: Candidate, runner_up: Candidate | None) -> str:
    lowest = min(pool, key=lambda c: c.loss)
    what = f"{choice.loss:.3f} nats a token at {figures.target:,} tokens"
    if runner_up is None:
        rank = "the only candidate that can be taken"
    elif choice is lowest:
        tie = "" if figures.beats(choice, runner_up) else f", though tied with {runner_up.name}"
        rank = f"the lowest of those that can be taken{tie}"
    else:
        less = "it needs less training" if choice.tokens < lowest.tokens else "it is the faster one, as far as measured"
        less = "there is nothing to do" if choice is figures.source else less
        rank = f"tied with the lowest, {lowest.loss:.3f} of {lowest.name}, and {less}"
    act = f"Keep the source as it is ({choice.name})" if choice is figures.source else f"Take {choice.name}"
    return f"{act}: {what}, {rank}."


def _reasons(
    figures: Figures, constraints: Constraints, choice: Candidate, runner_up: Candidate | None
) -> tuple[str, ...]:
    source, keep = figures.source, constraints.must_keep
    others = {} if runner_up is None else {runner_up.name: ("the runner-up", runner_up)}
    if source is not choice and not source.fault:
        others[source.name] = ("the source", source)
    against = [f"against {what}, {c.name}: {figures.difference(c, choice)}" for what, c in others.values()]
    kept = _keeping(choice)
    if choice.kept is not None and keep is not None and choice.kept.high > keep:
        kept += f", which could be as much as {choice.kept.high:.3f}, beyond --must-keep {keep:,}"
    trained = f"was trained on {choice.tokens:,} tokens; calibration and training"
    work = trained if choice.tokens else "was not trained; calibration"
    seen = [] if choice.retrieval is None else [f"answers {choice.retrieval:.0%} of the retrieval questions right"]
    seen += [] if choice.memory is None else [f"takes {choice.memory:.2f} times the source's memory"]
    return (
        f"At {figures.target:,} tokens {choice.name} loses {'; '.join([f'{choice.loss:.3f} nats a token', *against])}.",
        f"It {_speed(choice)}.",
        f"It {kept}.",
        f"It {work} took {choice.seconds:,.0f} seconds.",
        *([f"It {' and '.join(seen)}, which the choice does not weigh."] if seen else []),
    )


def _costs(figures: Figures, constraints: Constraints, choice: Candidate) -> Iterator[str]:
    for limit, bound in _given(constraints):
        freed = _taken(figures, limit.put(constraints, None))
        if freed is None or freed is choice:
            yield f"{limit.option(bound)} costs nothing: {choice.name} is taken without it too."
            continue
        more = figures.difference(freed, choice)
        what = f"{more.interval} nats a token" if more.real else f"nothing that this text shows, {more.interval}"
        yield f"{limit.option(bound)} costs {what}: without it {freed.name} is taken."


def _relaxed(figures: Figures, constraints: Constraints, choice: Candidate | None) -> Iterator[str]:
    """For each constraint the nearest value, as it is printed, at which one that beats the choice is taken."""
    for limit, bound in _given(constraints):
        pool = _admissible(figures, limit.put(constraints, None))
        steps = {limit.up(value) for c in pool if (value := limit.value(c)) is not None and value > bound}
        for step in sorted(steps):
            other = _taken(figures, limit.put(constraints, step))
            if other is not None and (choice is None or figures.beats(other, choice)):
                gain = f": {figures.difference(choice, other).interval} nats a token" if choice else ""
                yield f"At {limit.option(step)}, {other.name} is taken{gain}."
                break


def _tightened(
    figures: Figures, pool: Sequence[Candidate], constraints: Constraints, choice: Candidate
) -> Iterator[str]:
    """For each kind of constraint the highest value, as it is printed, below which the choice is no longer taken."""
    for limit in LIMITS:
        if limit.value(choice) is None:
            continue  # it meets no bound at all, which the reasons say
        steps = {limit.down(value) for c in pool if (value := limit.value(c)) is not None}
        for step in sorted((step for step in steps if step > 0), reverse=True):  # a bound is never negative
            other = _taken(figures, limit.put(constraints, math.nextafter(step, 0)))
            if other is not choice:
                if other is not None or limit.bound(constraints) is not None:  # nobody asked for what leaves nothing
                    yield f"Below {limit.option(step)}, {other.name if other else 'nothing'} is taken instead."
                break


def _ties(figures: Figures, pool: Sequence[Candidate], choice: Candidate) -> Iterator[str]:
    tied = {c.name: gap for c in pool if c is not choice and not (gap := figures.difference(choice, c)).real}
    others = [
        f"{name} ({gap.mean:+.3f}, where "
        f"{f'{gap.detectable:.3f}' if math.isfinite(gap.detectable) else 'no difference'} would show)"
        for name, gap in tied.items()
    ]
    if others:
        yield f"Tied with {choice.name}: {', '.join(others)}; more text would show smaller differences."


def _untried(figures: Figures, constraints: Constraints) -> Iterator[str]:
    most, given = max(c.tokens for c in figures.candidates), constraints.train_tokens
    if given is not None and given > most:
        yield f"More training than the {most:,} tokens measured, up to --train-tokens {given:,}, may reorder them."


def _failures(figures: Figures, constraints: Constraints) -> Iterator[str]:
    """Who comes nearest to each constraint that fails, then whom a single one keeps out.

    Nearest: of those that meet the most of the other constraints. A constraint that one of them meets does not fail.
    """
    working, given = [c for c in figures.candidates if not c.fault], _given(constraints)
    if not working:
        yield "No candidate works."
        return
    for limit, bound in given:
        met = [sum(other.met(c, constraints) for other, _ in given if other is not limit) for c in working]
        most = [c for c, count in zip(working, met, strict=True) if count == max(met)]
        nearest = min(most, key=lambda c: _or_infinite(limit.value(c)))
        if not limit.met(nearest, constraints):
            of = {len(given) - 1: " that meets the rest", 0: ""}.get(max(met), " that meets one of the rest")
            yield f"The nearest to {limit.option(bound)}{of}, {nearest.name}, {limit.excess(nearest, bound)}."
    freed = [
        f"without {limit.option(bound)}, {taken.name} is taken"
        for limit, bound in given
        if (taken := _taken(figures, limit.put(constraints, None)))
    ]
    apart = all(any(limit.met(c, constraints) for c in working) for limit, _ in given)
    start = "Each constraint can be met, but not all together" if apart else "Not all constraints can be met"
    yield f"{start}: {'; '.join(freed) or 'no single one, dropped, lets anybody in'}."
