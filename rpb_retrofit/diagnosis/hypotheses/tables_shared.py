"""Layers share one table where each was to have its own."""

from __future__ import annotations

import torch

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import unfitted, with_best

CAUSE = "the tables are shared by layers that should have their own"
PREDICTS = "two layers hold the same numbers, though the settings say shared=False"
KIND = CauseKind.NUMBERS
REMEDY = "restore each layer's own table from the checkpoint, or set shared=True if that is what was meant"


def examine(measurements: Measurements) -> Finding:
    """Compare each layer's numbers with every other's."""
    if measurements.arms.settings.get("shared"):
        return excluded("one table for all layers is what the settings ask for (shared=True)")
    if measurements.as_written:
        return excluded("every table is what was written, number for number")
    if (asked := unfitted(measurements)) is not None:
        return excluded(f"{asked}, which layers may have in common")
    twins: dict[str, list[str]] = {}
    firsts: list[str] = []
    biases = measurements.arms.biases
    for name, bias in biases.items():
        if float(bias.weight.detach().float().std()) == 0:
            continue
        twin = next(
            (
                f
                for f in firsts
                if biases[f].weight.shape == bias.weight.shape and torch.equal(biases[f].weight, bias.weight)
            ),
            None,
        )
        if twin is None:
            firsts.append(name)
        else:
            twins.setdefault(twin, [twin]).append(name)
    if twins:
        names = [name for group in twins.values() for name in group]
        return confirmed(
            f"{len(names)} of {len(biases)} layers hold the numbers of another: {name_layers(names)}",
            REMEDY,
            effect=with_best(measurements, names),
        )
    return excluded("no two layers hold the same numbers")
