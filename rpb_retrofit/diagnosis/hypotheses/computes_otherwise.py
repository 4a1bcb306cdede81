"""The model does not compute what its weights, tables and settings say: something was put in its way."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import of_kind

CAUSE = "the model does not compute what its weights say"
PREDICTS = (
    "a model built anew from the config and the same weights gives other outputs on the text; or the bias that acts "
    "is no form of the table"
)
KIND = CauseKind.RUNNING


def examine(measurements: Measurements) -> Finding:
    """Build the model anew, and find the first module whose output differs."""
    anew = measurements.rebuilt
    if anew.module is not None:
        return confirmed(
            f"on {anew.length} tokens {anew.module} is the first module to differ from a model that was built anew "
            f"from the same config and weights; outputs differ by up to {anew.difference:.1%} of their size",
            f"look at what was changed in {anew.module} in this process: a hook, a replaced method, an attribute; or "
            "load the checkpoint anew",
            figures={"module": anew.module},
        )
    if strange := of_kind(measurements, "changed in no way that is known"):
        worst = max(measurements.bias_checks[name].difference for name in strange)
        return confirmed(
            f"the bias that acts differs from the table's by up to {worst:.2f} nats, in no way that is known, in "
            f"{name_layers(strange)}",
            "look for whatever replaces or wraps the bias module or the attention",
        )
    return excluded(
        f"a model built anew from the same config and weights gives the same outputs on {anew.length} tokens, "
        f"module by module (largest difference {anew.difference:.0e} of their size)"
    )
