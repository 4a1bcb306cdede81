"""The retrofit as it should run: built anew from its weights, and from its config with the source's settings."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from rpb_retrofit.diagnosis.effect import Effect
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, Outcome, confirmed
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.rebuilt import anew
from rpb_retrofit.diagnosis.settings import other_settings

HOPELESS = ("does_not_run", "not_finite")
"""Hypotheses under which no figure can be measured."""


def with_gains(measurements: Measurements, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes; what makes the model run wrongly and could not be undone by itself with what mending it all brings.

    A wrong way to feed it has its own figure, and where the model gives no numbers there is none.
    """
    if any(o.confirmed and o.name in HOPELESS for o in outcomes):
        return outcomes
    wrong = [o for o in outcomes if o.confirmed and o.kind is CauseKind.RUNNING and o.finding.gain is None]
    if not wrong or not measurements.arms.causal:
        return outcomes
    effect = measurements.attempt("what running as it should brings", lambda: _mended(measurements), None)
    if effect is None:
        return outcomes
    return [replace(o, finding=_with_gain(o.finding, effect)) if o in wrong else o for o in outcomes]


def _with_gain(finding: Finding, effect: Effect) -> Finding:
    undoing = "built anew with the source's settings, "
    return confirmed(finding.because, finding.remedy, effect=effect, undoing=undoing, figures=finding.figures)


def _mended(measurements: Measurements) -> Effect:
    config = deepcopy(measurements.arms.retrofit.config)
    source = measurements.arms.source
    if source is not None:
        for key in {name.partition(".")[0] for name in other_settings(measurements.arms)}:
            setattr(config, key, deepcopy(getattr(source.config, key, None)))
    return measurements.undoing.replaced("built anew", anew(measurements.arms.retrofit, config))
