"""The model does not run at all."""

from __future__ import annotations

import torch

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.files.printable import message_of
from rpb_retrofit.tables.recording import run

CAUSE = "the model does not run"
PREDICTS = "a forward pass of a few tokens of the text ends in an error"
KIND = CauseKind.RUNNING


@torch.no_grad()
def examine(measurements: Measurements) -> Finding:
    """Run it."""
    try:
        run(measurements.arms.retrofit, measurements.text.window(min(measurements.text.lengths)))
    except Exception as error:  # whatever a model raises
        return confirmed(
            f"{type(error).__name__}: {message_of(error)}", "do what the error says; everything else waits"
        )
    return excluded("a forward pass ends well")
