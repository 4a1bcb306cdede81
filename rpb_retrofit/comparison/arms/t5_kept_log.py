"""T5's bias with a logarithmic tail beside RoPE's high frequencies; tables and factors calibrated."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm(
    "t5-kept-log",
    "T5 bias with a logarithmic tail beside RoPE's high frequencies, tables and content factors calibrated",
    number="frequencies kept",
    keep_frequencies="auto",
    calibrate="tables+content",
    tail="log",
)
