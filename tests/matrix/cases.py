"""The diagnoses of the matrix: healthy retrofits of every sort, and faults planted in one."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.finding import CauseKind
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.run import run_diagnosis
from rpb_retrofit.runtime.anatomy import submodels
from rpb_retrofit.tables.checksums import KEY
from rpb_retrofit.text.tokens import tokenise
from tests.diagnosis.faults import FAULTS, Fault, reloaded
from tests.matrix.retrofits import SORTS, retrofit, source
from tests.matrix.texts import text

PAIRS = (("prose", "dialogue"), ("code", "prose"), ("dialogue", "help"), ("help", "code"))
"""What is calibrated on, and what is examined on."""

PLAN = DiagnosisPlan(lengths=(128, 512), tokens=2048, probed=1024, items=0, rounds=0)

OF_SMALL_MODELS = (
    *("RoPE's base", "kept frequencies", "another model", "the last bucket", "two buckets", "texts longer"),
    *("training on far", "another language", "induction was", "nothing ever"),
)
"""How the names of faults begin that make or train a small model of their own."""


@dataclass(frozen=True)
class Case:
    """A diagnosis: of a healthy retrofit, or of one in which a fault was planted. ``pair``: of texts. ``recorded``:
    whether its config has the checksums of its tables, which one trained by other means, or an older one, has not."""

    sort: str
    dtype: str
    pair: int
    fault: Fault | None = None
    recorded: bool = True

    @property
    def name(self) -> str:
        """What tells it from all others."""
        calibration, examined = PAIRS[self.pair]
        healthy = (
            f"{self.sort}{'' if self.recorded else ' without checksums'}, {self.dtype}, {calibration} to {examined}"
        )
        return healthy if self.fault is None else f"{healthy}: {self.fault}"


def healthy() -> Iterator[Case]:
    """Every sort on every pair of texts, one pair of the four in float32."""
    for sort in SORTS:
        for pair in range(len(PAIRS)):
            yield Case(sort, "float32" if pair == 3 else "bfloat16", pair)
    for number, sort in enumerate(SORTS):
        pair = number % len(PAIRS)
        yield Case(sort, "float32" if pair == 3 else "bfloat16", pair, recorded=False)


def planted() -> Iterator[Case]:
    """Every fault that any model can have, on a pair of texts of two in turn; those of kept frequencies besides."""
    faults = [fault for fault in FAULTS if not fault.name.startswith(OF_SMALL_MODELS)]
    for number, fault in enumerate(faults):
        yield Case("tables", "bfloat16", (0, 2)[number % 2], replace(fault, lengths=PLAN.lengths))
    yield Case("kept 16", "bfloat16", 0, Fault("RoPE's base was changed", "position_scaling", _other_base))
    yield Case("kept 16", "bfloat16", 2, Fault("kept frequencies were dropped", "settings_differ", _none_kept))


def _other_base(arms: Arms) -> Arms:
    rope = {**arms.retrofit.config.rope_parameters, "rope_theta": 1_000.0}
    return replace(arms, retrofit=reloaded(arms.retrofit, rope_parameters=rope))


def _none_kept(arms: Arms) -> Arms:
    settings = {**arms.retrofit.config.rpb_retrofit, "kept_frequencies": {}}
    return replace(arms, retrofit=reloaded(arms.retrofit, rpb_retrofit=settings))


@lru_cache(1)
def _source(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


_KNOWN: dict[tuple[str, str], dict[str, Any]] = {}
"""What was measured of a source on a text, by dtype and text."""


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Diagnose it: what was named, in order, and the figures behind it.

    Only hypotheses that can be named before the truth, or are false alarms, are tested: of a healthy retrofit those of
    how it runs and of its numbers.
    """
    calibration, examined = PAIRS[case.pair]
    before = source(folder, case.dtype)
    place = retrofit(folder, case.sort, case.dtype, calibration)
    arms = Arms(rpb.load(place).eval(), _source(str(before)))
    if not case.recorded:
        for submodel in submodels(arms.retrofit):
            settings = submodel.config.rpb_retrofit
            submodel.config.rpb_retrofit = {key: value for key, value in settings.items() if key != KEY}
    if case.fault is not None:
        arms = case.fault.plant(arms) or arms
    tokenizer = AutoTokenizer.from_pretrained(before)
    measurements = Measurements(arms, tokenise(tokenizer, [text(examined)[:100_000]]), None, PLAN)
    known = _KNOWN.setdefault((case.dtype, examined), {})
    measurements.journal.held |= known  # the source is the same in all
    start = time.perf_counter()
    deepest = CauseKind.NUMBERS if case.fault is None else _kind(case.fault.cause)
    diagnosis = run_diagnosis(measurements, hypotheses=[h for h in HYPOTHESES if h.kind <= deepest], figures=False)
    ways = {} if diagnosis.failed else {name: way.difference for name, way in measurements.ways.by_name.items()}
    known |= {
        name: value
        for name, value in measurements.journal.held.items()
        if name.endswith("source") or "-source-" in name
    }
    del arms
    gc.collect()
    effects = {o.name: o.finding.effect for o in diagnosis.outcomes if o.finding.effect is not None}
    return {
        "case": case.name,
        "truth": None if case.fault is None else case.fault.cause,
        "named": [cause.name for cause in diagnosis.causes],
        "because": {cause.name: cause.finding.because for cause in diagnosis.causes},
        "failed": diagnosis.failed,
        "shares": {name: effect.share for name, effect in effects.items()},
        "noise": math.nan if diagnosis.failed else measurements.ways.noise,
        "ways": ways,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _kind(cause: str) -> CauseKind:
    return next(h.kind for h in HYPOTHESES if h.name == cause)
