"""The tables lost their precision: half-precision numbers, where a tenth of a nat decides."""

from __future__ import annotations

import torch

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.shared_evidence import with_best

CAUSE = "the tables lost precision"
PREDICTS = "tables are in half precision or hold only numbers that it can express"
KIND = CauseKind.RUNNING
REMEDY = (
    "keep the tables in float32, as rpb_retrofit.load and save_pretrained do, and train them as float32 masters; "
    "restore rounded ones from a checkpoint of before"
)


def examine(measurements: Measurements) -> Finding:
    """Look at the tables' dtype and numbers."""
    tables = {name: bias.weight.detach() for name, bias in measurements.arms.biases.items()}
    half = [name for name, table in tables.items() if table.dtype != torch.float32]
    if half:
        kinds = {str(tables[name].dtype).removeprefix("torch.") for name in half}
        return confirmed(
            f"the tables of {name_layers(half)} are {' and '.join(sorted(kinds))}, not float32",
            REMEDY,
        )
    if measurements.as_written:
        return excluded(f"the {len(tables)} tables are float32, and what was written, bit for bit")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [
            name
            for name, table in tables.items()
            if float(table.std()) > 0
            and torch.equal(table, table.to(dtype).float())
            and not torch.equal(table, table.round())
        ]
        if rounded:
            size = max(float(tables[name].abs().max()) for name in rounded)
            step = torch.finfo(dtype).eps * size / 2
            return confirmed(
                f"every number in the tables of {name_layers(rounded)} is one that {str(dtype).removeprefix('torch.')} "
                f"can express: they were rounded, by up to {step:.3f} nats",
                REMEDY,
                effect=with_best(measurements, rounded),
            )
    return excluded(f"the {len(tables)} tables are float32 with more digits than half precision")
