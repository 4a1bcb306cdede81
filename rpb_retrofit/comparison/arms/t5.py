"""T5's bias, its tables fitted to what the source attends to and hands on; all weights as they were."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm("t5", "T5 bias in the place of the source's positions, tables calibrated")
