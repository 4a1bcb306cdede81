"""Method or scale? The positional method crossed with everything else that changes scores by position or in size.

Each factor is switched on and off under both methods, the source's and the retrofit's, on the same text. What the
retrofit costs above its source then falls into the method's share, the factor's and their interaction, which add up to
it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

from rpb_retrofit.diagnosis.arms import RETROFIT, baseline
from rpb_retrofit.diagnosis.intervention import Change
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import content_ratios, scale_in_weights
from rpb_retrofit.diagnosis.undoing import AS_IT_IS
from rpb_retrofit.diagnosis.weights import collinear
from rpb_retrofit.evaluation.losses import Losses, contrast
from rpb_retrofit.evaluation.statistics import Difference

SCALE = "score scale"


@dataclass(frozen=True)
class Crossing:
    """The method crossed with one factor: losses in nats a token of the four cells, and the effects.

    ``cells``: source without and with the factor, retrofit without and with it. ``method``: the retrofit's above the
    source's, without the factor. ``factor``: with it above without it, under the source's method. ``both``: what they
    do together beyond that. ``gap``: the retrofit above the source as they are; for the `SCALE` it is the sum of the
    three. ``about``: what the factor was.
    """

    name: str
    about: str
    cells: tuple[float, float, float, float]
    gap: Difference
    method: Difference
    factor: Difference
    both: Difference

    def __str__(self) -> str:
        if self.name != SCALE:
            return (
                f"the source changes by {self.factor.mean:+.3f}, the retrofit by "
                f"{self.factor.mean + self.both.mean:+.3f} nats a token"
            )
        return (
            f"{self.factor.mean:+.3f} of the {self.gap.mean:+.3f} nats come from the {self.name}, "
            f"{self.method.mean:+.3f} from the positional method, {self.both.mean:+.3f} from both together"
        )


def factorial(measurements: Measurements) -> list[Crossing]:
    """The crossings that apply; none without a source or where a family keeps its queries to itself.

    With a control, that is the source's side: it was trained as the retrofit was.
    """
    side = baseline(dict(measurements.arms))
    if (
        side not in dict(measurements.arms)
        or not measurements.arms.causal
        or not measurements.arms.family.uses_interface
        or not measurements.running
    ):
        return []
    crossings = [
        measurements.attempt(
            f"the crossing of method and {factor[0]}", partial(_cross, measurements, side, *factor), None
        )
        for factor in _factors(measurements)
    ]
    return [crossing for crossing in crossings if crossing is not None]


def _factors(measurements: Measurements) -> Iterator[tuple[str, str, Change, Change, Change, Change]]:
    """Name, description, and the changes of the four cells: source and retrofit, each without and with it."""
    plain, length = Change(), measurements.text.middle
    ratio = content_ratio(measurements)
    if ratio is not None and abs(ratio - 1) > 0.03:
        about = f"the content term times {ratio:.3g}, as the retrofit has it, against the source's"
        yield SCALE, about, plain, Change(scale=ratio), Change(scale=1 / ratio), plain
    start = max(8, length // 4)
    grown = Change(trained=start)
    yield "length factor", f"the content term grows with log n from {start} keys on", plain, grown, plain, grown
    near = Change(window=max(8, length // 4))
    yield "attention window", f"keys {near.window} or more away are not seen", plain, near, plain, near
    trained = measurements.arms.trained_context
    rope = getattr(measurements.arms.retrofit.config.get_text_config(), "rope_parameters", None)
    if (
        measurements.arms.family.mechanism == "rope"
        and trained
        and isinstance(rope, dict)
        and rope.get("rope_type") == "default"
    ):
        settings = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": trained}
        yarn = Change(rope=settings)
        yield "RoPE scaling", "YaRN to twice the trained length", plain, yarn, plain, yarn


def content_ratio(measurements: Measurements) -> float | None:
    """What multiplies the retrofit's content term, over what multiplies the source's; None where it cannot be seen."""
    ratios = list(content_ratios(measurements).values())
    if not ratios or measurements.arms.source is None:
        return None
    stretched = collinear(measurements.arms.retrofit, measurements.arms.source)
    by_layer = []
    for name in measurements.arms.attentions:
        factors = [f for weight, f in stretched.items() if weight.startswith(f"{name}.") and _makes_scores(weight)]
        by_layer.append(math.prod(factors) / scale_in_weights(measurements, name))
    return median(ratios) * median(by_layer)


def _makes_scores(weight: str) -> bool:
    return weight.endswith(
        ("q_proj.weight", "k_proj.weight", "query.weight", "key.weight", "q_lin.weight", "k_lin.weight")
    )


def _cross(
    measurements: Measurements,
    side: str,
    name: str,
    about: str,
    source_off: Change,
    source_on: Change,
    off: Change,
    on: Change,
) -> Crossing:
    def cell(role: str, change: Change, how: str) -> Losses:
        label = AS_IT_IS if change == Change() else f"{name} {how}".replace(" ", "-")
        return measurements.undoing.losses(role, label, change, measurements.text.middle)

    a, b = cell(side, source_off, "off"), cell(side, source_on, "on")
    c, d = cell(RETROFIT, off, "off"), cell(RETROFIT, on, "on")
    actual = d if name == SCALE else c
    return Crossing(
        name,
        about,
        (a.mean, b.mean, c.mean, d.mean),
        gap=contrast([(1, actual), (-1, a)]),
        method=contrast([(1, c), (-1, a)]),
        factor=contrast([(1, b), (-1, a)]),
        both=contrast([(1, d), (-1, c), (-1, b), (1, a)]),
    )
