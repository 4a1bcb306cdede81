"""The source's own mechanism still works, beside the bias or in its place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.errors import UnsupportedModelError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.swap.kept_frequencies import kept_by_attention

CAUSE = "the source's mechanism is still active"
PREDICTS = (
    "shown one hidden state at every position, an attention makes queries or keys that differ by position; or the "
    "embeddings of one token do"
)
KIND = CauseKind.RUNNING
REMEDY = "load the retrofit with rpb_retrofit.load, which neutralises the mechanism, and leave its modules as they are"

MOVED = 0.05
"""Difference between positions, relative to the size of the vectors, that is more than rounding in half precision."""


def examine(measurements: Measurements) -> Finding:
    """Look at what differs between positions where nothing else does."""
    probe, family = measurements.position_probe, measurements.arms.family
    if probe.embedded > MOVED:
        return confirmed(
            f"the embeddings of one and the same token differ by {probe.embedded:.2f} of their size between positions, "
            "before any attention: the source's position vectors are added",
            REMEDY,
        )
    if family.mechanism == "alibi":
        sloped = [n for n, c in measurements.bias_checks.items() if c.kind == "with slopes of the offset added"]
        if sloped:
            evidence = f"the bias that acts is the table's plus slopes of the offset in {name_layers(sloped)}"
            return confirmed(evidence, REMEDY)
        return excluded("no slopes of the offset are added to the tables' bias")
    turning = {n: p.turning for n, p in probe.probes.items() if p.turning is not None}
    if not turning:
        return unknown("this family keeps its queries to itself; its embeddings do not differ by position")
    still = {name: ~mask for name, mask in _meant_to_rotate(measurements, turning).items()}
    moved = {name: _largest(turned, still[name]) for name, turned in turning.items()}
    moving = {name: size for name, size in moved.items() if size > MOVED}
    if moving:
        return confirmed(
            f"with one hidden state at every position, queries and keys differ by up to {max(moving.values()):.2f} "
            f"of their size in {len(moving)} of {len(moved)} layers ({name_layers(moving)})",
            REMEDY,
            figures={"layers": list(moving)},
        )
    kept = max(int((~mask).sum()) for mask in still.values())
    aside = f", the {kept} dimensions aside that are meant to rotate" if kept else ""
    return excluded(
        f"queries, keys and embeddings of one token are the same at every position in all {len(moved)} layers{aside} "
        f"(largest difference {max(moved.values()):.0e})"
    )


def _largest(turned: Tensor, still: Tensor) -> float:
    chosen = turned[still[: len(turned)]]
    return float(chosen.max()) if len(chosen) else 0.0


def _meant_to_rotate(measurements: Measurements, turning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dimensions of a head that go on rotating by the retrofit's settings, by attention, as masks (width,)."""
    anatomy = Anatomy.of(measurements.arms.plain)
    masks = {name: torch.zeros(len(turned), dtype=torch.bool) for name, turned in turning.items()}
    for name, kept in kept_by_attention(anatomy, measurements.arms.settings).items():
        if name not in masks or not kept:
            continue
        try:
            for dimensions in anatomy.rotary_pairs.dimensions():
                masks[name][dimensions[:kept]] = True
        except UnsupportedModelError:
            masks[name][:] = True
    return masks
