"""Scaling of positions was left in: RoPE's base or scaling in the config, or queries that grow with their position."""

from __future__ import annotations

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.settings import other_settings

CAUSE = "scaling of positions was left in"
PREDICTS = (
    "a query grows with its position though nothing rotates (as Llama 4 scales them), and the source's does not; or "
    "config.json has another RoPE base or scaling than the source's"
)
KIND = CauseKind.RUNNING
REMEDY = (
    "set rope_parameters and every scale by position to the source's values: YaRN multiplies queries and keys even "
    "where nothing rotates, and kept frequencies turn at the base that is set"
)

GROWN = 0.05
"""Share by which the longest query is longer than the shortest one, beyond rounding."""


def examine(measurements: Measurements) -> Finding:
    """Look at how long queries are by position, and at what the config says of positions."""
    source_probes = measurements.source_position_probe.probes
    grown = {n: p.growth for n, p in measurements.position_probe.probes.items() if p.growth > 1 + GROWN}
    new = {n: growth for n, growth in grown.items() if n not in source_probes or source_probes[n].growth < 1 + GROWN}
    if new:
        return confirmed(
            f"queries of one hidden state are up to {max(new.values()):.2f} times as long at one position as at "
            f"another in {name_layers(new)}; the source's are not",
            REMEDY,
        )
    by_design = f"; queries grow by the source's own design, {max(grown.values()):.2f} times" if grown else ""
    if measurements.arms.source is None:
        return excluded(f"no query grows with its position beyond what its family does{by_design}")
    left = {key: values for key, values in other_settings(measurements.arms).items() if _about_positions(key)}
    if left:
        evidence = ", ".join(f"{key}={mine!r} (source: {its!r})" for key, (mine, its) in left.items())
        return confirmed(f"the config has {evidence}", REMEDY)
    return excluded(f"no query grows with its position, and the config's RoPE settings are the source's{by_design}")


def _about_positions(key: str) -> bool:
    return any(word in key for word in ("rope", "rotary", "floor_scale", "attn_scale", "temperature_tuning"))
