"""The tables hold nothing: zeros or one number where a table should be, or no numbers at all."""

from __future__ import annotations

import torch

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.provenance import is_written
from rpb_retrofit.diagnosis.shared_evidence import with_best
from rpb_retrofit.tables import FROM

CAUSE = "the tables were not loaded, or say nothing"
PREDICTS = "tables are zero, hold one number, or are alike in all heads, though they were made to be otherwise"
KIND = CauseKind.NUMBERS
REMEDY = (
    "load the checkpoint with rpb_retrofit.load, which refuses one without its tables; if they were never fitted, "
    "retrofit again with --init calibrated"
)

FLAT = 1e-6
"""Nats by which a table's numbers differ at least."""


def examine(measurements: Measurements) -> Finding:
    """Look at the numbers."""
    biases, init = measurements.arms.biases, measurements.arms.settings.get("init", "")
    tables = {name: bias.weight.detach().float() for name, bias in biases.items()}
    broken = [name for name, table in tables.items() if not bool(table.isfinite().all())]
    if broken:
        return confirmed(f"tables hold numbers that are none (NaN or infinite) in {name_layers(broken)}", REMEDY)
    if measurements.as_written:
        return excluded(f"all {len(tables)} tables are what was written, number for number (init='{init}')")
    flat = [name for name, table in tables.items() if float((table.amax(1) - table.amin(1)).max()) < FLAT]
    if flat:
        zero = all(not bool(tables[name].any()) for name in flat)
        evidence = (
            f"{len(flat)} of {len(tables)} tables {'are zero' if zero else 'hold one number a head'} (init='{init}'): "
            f"{name_layers(flat)}"
        )
        if zero and init == "zeros" and all(is_written(measurements.arms, name, tables[name]) for name in flat):
            return excluded(f"{evidence}, as init='zeros' asks")
        return confirmed(evidence, REMEDY, effect=with_best(measurements, flat))
    alike = [
        name
        for name, table in tables.items()
        if len(table) > 1 and float((_centred(table) - _centred(table)[:1]).abs().max()) < FLAT
    ]
    if alike:
        evidence = f"all heads have the same row in {name_layers(alike)}"
        if init.startswith(FROM):
            return excluded(f"{evidence}: init='{init}' may give all of them the table of one head")
        return confirmed(evidence, REMEDY, effect=with_best(measurements, alike))
    return excluded(f"all {len(tables)} tables are finite, differ by head and by bucket")


def _centred(table: torch.Tensor) -> torch.Tensor:
    return table - table.mean(1, keepdim=True)
