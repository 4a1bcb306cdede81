"""Running a diagnosis: every hypothesis is tested, then every figure of the report measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rpb_retrofit.diagnosis.costs import Figures
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES, Hypothesis
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.repair import HOPELESS, with_gains
from rpb_retrofit.diagnosis.report_data import all_figures
from rpb_retrofit.diagnosis.result import Diagnosis
from rpb_retrofit.runtime.modeling import UNSAVED


def run_diagnosis(
    measurements: Measurements,
    text: str = "",
    progress: Callable[[str], None] = lambda line: None,
    hypotheses: Sequence[Hypothesis] = HYPOTHESES,
    figures: bool = True,
) -> Diagnosis:
    """Test ``hypotheses`` on the models of ``measurements`` and measure the ``figures`` of a report.

    ``text`` is what the documents are called; ``progress`` is told what is being done. DataError where the text is
    shorter than the shortest length.
    """
    start = time.perf_counter()
    assert measurements.text.lengths, "text that is too short for all of them is an error of its own"
    outcomes = []
    for number, hypothesis in enumerate(hypotheses, 1):
        progress(f"[{number}/{len(hypotheses)}] is it that {hypothesis.cause}?")
        outcomes.append(hypothesis(measurements))
    outcomes = with_gains(measurements, outcomes)
    measured: Figures = {}
    hopeless = [outcome for outcome in outcomes if outcome.confirmed and outcome.name in HOPELESS]
    if hopeless and figures:
        measurements.skipped["the figures"] = f"{hopeless[0].cause}: there is nothing to measure"
    elif figures:
        progress("measuring what the report shows")
        measured = all_figures(measurements)
    nameless = (None, "", UNSAVED)
    names = {
        role: type(m).__name__ if m.name_or_path in nameless else str(m.name_or_path) for role, m in measurements.arms
    }
    return Diagnosis(
        names,
        text,
        asdict(measurements.plan),
        outcomes,
        measured,
        dict(measurements.skipped),
        time.perf_counter() - start,
        dict(measurements.failed),
        measurements.arms.family.mechanism,
    )
