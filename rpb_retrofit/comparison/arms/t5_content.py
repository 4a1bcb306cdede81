"""T5's bias, tables and factors on the content calibrated: no rotation is left."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm(
    "t5-content",
    "T5 bias with a logarithmic tail, tables and content factors calibrated",
    calibrate="tables+content",
    tail="log",
)
