"""The bias is not added: an attention implementation set later, a class that knows nothing of it."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.runtime.interface import ATTENTION

CAUSE = "the bias is dropped"
PREDICTS = (
    "the attention weights of equal keys are equal, though the table says otherwise; or the bias is never asked for"
)
KIND = CauseKind.RUNNING
REMEDY = (
    "load the retrofit with rpb_retrofit.load and leave the attention implementation alone: only the retrofit's own "
    "adds the bias"
)


def examine(measurements: Measurements) -> Finding:
    """Compare what acts with what the tables promise."""
    arms, model = measurements.arms, measurements.arms.retrofit
    implementation = model.config._attn_implementation
    without = [name for name in arms.attentions if name not in arms.biases]
    if without:
        return confirmed(
            f"{len(without)} of {len(arms.attentions)} attentions have no table ({name_layers(without)}); the model is "
            f"a {type(model).__name__}",
            REMEDY,
        )
    if arms.family.uses_interface and implementation != ATTENTION:
        return confirmed(
            f"the attention implementation that is set is '{implementation}', not '{ATTENTION}'",
            REMEDY,
        )
    if silent := [name for name in arms.attentions if name not in measurements.position_probe.probes]:
        return confirmed(
            f"{len(silent)} of {len(arms.attentions)} attentions do not run the retrofit's attention "
            f"({name_layers(silent)})",
            REMEDY,
        )
    dropped = [name for name, comparison in measurements.bias_checks.items() if comparison.kind == "dropped"]
    if dropped:
        worst = max(measurements.bias_checks[name].difference for name in dropped)
        return confirmed(
            f"equal keys get equal weights at every offset in {name_layers(dropped)}, where the tables differ by up to "
            f"{worst:.2f} nats",
            REMEDY,
        )
    return excluded(f"the bias is asked for and acts in all {len(measurements.bias_checks)} attentions")
