"""A comparison: every arm put into the source, measured on the same text, trained alike where that is wanted."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation, twin
from rpb_retrofit.comparison.arms import parse
from rpb_retrofit.comparison.healing import Healed, Healing
from rpb_retrofit.comparison.measures import Benchmark, ComparisonPlan, Measured
from rpb_retrofit.errors import ConfigError, InterruptedRunError, RetrofitError
from rpb_retrofit.evaluation.losses import Losses
from rpb_retrofit.evaluation.speed import Seconds, Skipped, SpeedResult, speed
from rpb_retrofit.files.journal import Journal

SOURCE = "source"


@dataclass(frozen=True)
class Made:
    """An arm in its twin: ``how`` a user gets it, and the seconds that it took (calibration is most of them)."""

    how: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """One arm with one budget of training: what was measured of it, once for each seed.

    ``tokens``: it was trained on, at the peak ``rate``; ``seconds``: of that, searching for the rate included.
    """

    arm: str
    about: str
    made: Made
    measured: Sequence[Measured]
    tokens: int = 0
    rate: float | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The arm's, and whether it was trained."""
        return f"{self.arm} healed" if self.tokens else self.arm


MEASURED = (Made, Measured, Healed, Losses, SpeedResult, Seconds, Skipped)
"""The data classes of measurements, which a journal may hold."""


@dataclass
class Comparison:
    """What was measured: ``rows``, the source first, and prompts' ``timed`` results by arm; what could not be, and
    why, in ``skipped``."""

    plan: ComparisonPlan
    context: int
    rows: list[Row] = field(default_factory=list)
    timed: Mapping[str, Sequence[SpeedResult | Skipped]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class Compare:
    """The arms of one source. Twins are made when they are first needed, so what the journal holds costs nothing."""

    def __init__(
        self,
        source: PreTrainedModel,
        names: Sequence[str],
        plan: ComparisonPlan,
        windows: Sequence[Tensor],
        journal: Journal | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``names`` as of `arms.parse`; the source is always among the arms. ``windows``: to calibrate on.

        Raises ConfigError for an unknown arm, or a source that is a retrofit.
        """
        if getattr(source.config, "rpb_retrofit", None) is not None:
            raise ConfigError(f"'{source.name_or_path}' is a retrofit already: compare the arms on its source")
        self.source, self.plan, self.journal, self.say = source, plan, journal or Journal(), say
        self.arms: dict[str, tuple[Arm, float | None]] = {SOURCE: parse(SOURCE)}
        self.arms |= {name.strip(): parse(name) for name in names}
        self.situation = Situation(source, plan.target, windows)
        self.skipped: dict[str, str] = {}
        self._twins: dict[str, PreTrainedModel] = {}

    def run(
        self, documents: Sequence[Tensor], bos: int | None, tokenizer: Any, healing: Healing | None = None
    ) -> Comparison:
        """Measure every arm that applies on the text, untrained, and after ``healing``; raises DataError where the text
        is too short for the target."""
        context = self.situation.context  # named here where nothing says what it is
        benchmark = Benchmark.make(self.plan, documents, bos, tokenizer, self.skipped)
        made = {name: one for name in self.arms if (one := self._made(name)) is not None}
        timed = self.timed(list(made))
        rows: list[Row] = []
        for number, name in enumerate(made, 1):
            self.say(f"[{number}/{len(made)}] measuring {name}")
            rows += self.measure(name, benchmark, healing)
            self._twins.pop(name, None)  # not needed any more
        for row in rows:
            for measured in row.measured:
                self.skipped |= {f"{row.name}: {what}": why for what, why in measured.failed.items()}
        rows.sort(key=lambda row: bool(row.tokens))  # the source, and then the trained source, lead their kind
        return Comparison(self.plan, context, rows, timed, self.skipped)

    def measure(self, name: str, benchmark: Benchmark, healing: Healing | None) -> list[Row]:
        """The rows of one arm: untrained, and trained where that is wanted; none where it does not apply."""
        if (made := self._made(name)) is None:
            return []
        measured = self.journal(f"measured-{name}", partial(self._measure, benchmark, name))
        row = Row(name, self.arms[name][0].about, made, [measured])
        return [row, *([] if healing is None else self._healed(row, healing, benchmark))]

    def model(self, name: str) -> PreTrainedModel:
        """The twin of an arm."""
        if name not in self._twins:
            self._make(name)
        return self._twins[name]

    def _measure(self, benchmark: Benchmark, name: str) -> Measured:
        return benchmark.measure(self.model(name), name)

    def _made(self, name: str) -> Made | None:
        """What making an arm took; None, with the reason in ``skipped``, where it does not apply."""
        try:
            return self.journal(f"made-{name}", lambda: self._make(name))
        except RetrofitError as error:
            self.skipped[name] = str(error)
            self.say(f"{name} does not apply: {error}")
            return None

    def _make(self, name: str) -> Made:
        arm, number = self.arms[name]
        start = time.perf_counter()
        model = twin(self.source, shared=not arm.rewrites)
        how = arm.apply(model, replace(self.situation, number=number))
        self._twins[name] = model.eval()
        return Made(how, time.perf_counter() - start)

    def timed(self, names: Sequence[str]) -> Mapping[str, Sequence[SpeedResult | Skipped]]:
        """All arms in turns, so that whatever else the machine does disturbs them alike."""
        if not self.plan.timed or not self.plan.rounds:
            return {}

        def take() -> Mapping[str, Sequence[SpeedResult | Skipped]]:
            self.say(f"timing {len(names)} arms at {', '.join(map(str, self.plan.timed))} tokens")
            return speed({name: self.model(name) for name in names}, self.plan.timed, 16, self.plan.rounds)

        others = zlib.crc32(",".join(names).encode())  # other arms would have taken other turns
        return self.journal(f"speed-{others:08x}", take)

    def _healed(self, row: Row, healing: Healing, benchmark: Benchmark) -> list[Row]:
        """The trained row of an arm; none, with the reason in ``skipped``, where it cannot be trained."""
        name, measured = row.arm, []
        try:
            rate, seconds = self._rate(name, healing)
            for seed in range(healing.seeds):

                def take(seed: int = seed) -> tuple[Measured, Healed]:
                    self.say(f"training {name}, seed {seed + 1} of {healing.seeds}")
                    copied = twin(self.model(name), shared=False)
                    trained, healed = healing.heal(copied, rate, seed, name, self.say)
                    return benchmark.measure(trained, f"{name} healed"), healed

                figures, healed = self.journal(f"healed-{name}-{seed}", take)
                measured.append(figures)
                seconds += healed.seconds / healing.seeds
        except InterruptedRunError:
            raise
        except RetrofitError as error:
            self.skipped[f"{name} healed"] = str(error)
            self.say(f"{name} cannot be trained: {error}")
            return []
        return [Row(name, row.about, row.made, measured, healing.recipe.tokens, rate, seconds)]

    def _rate(self, name: str, healing: Healing) -> tuple[float, float]:
        """The rate with the lowest held-out loss, and the seconds of the search."""
        if len(healing.rates) == 1:
            return healing.rates[0], 0.0
        tries = []
        for rate in healing.rates:

            def take(rate: float = rate) -> tuple[float, float]:
                self.say(f"trying rate {rate:g} on {name}")
                start = time.perf_counter()
                loss = healing.search(twin(self.model(name), shared=False), rate, name, self.say)
                return loss, time.perf_counter() - start

            tries.append(self.journal(f"rate-{name}-{rate:g}", take))
        (loss, _), rate = min(zip(tries, healing.rates, strict=True), key=lambda tried: tried[0][0])
        if loss == float("inf"):
            raise ConfigError(
                f"it diverges at every rate ({', '.join(f'{r:g}' for r in healing.rates)}): give lower --rates"
            )
        return rate, sum(seconds for _, seconds in tries)
