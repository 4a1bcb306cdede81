"""T5's bias from zero tables, where training starts without calibration."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm("t5-zeros", "T5 bias, tables zero", usual=False, init="zeros")
