"""Faults to plant in a healthy retrofit: in its weights, config, cache path, mask or data; each with its true name."""

from __future__ import annotations

# The order of the imports is that of FAULTS, by which `tests.matrix` deals them out to its texts.
from tests.diagnosis.faults import running, tables_and_weights, training
from tests.diagnosis.faults.planting import FAULTS, Fault, reloaded

__all__ = ["FAULTS", "Fault", "reloaded", "running", "tables_and_weights", "training"]
