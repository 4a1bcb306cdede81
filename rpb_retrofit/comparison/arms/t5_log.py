"""T5's bias with a logarithmic tail, calibrated."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm("t5-log", "T5 bias with a logarithmic tail, tables calibrated", usual=False, tail="log")
