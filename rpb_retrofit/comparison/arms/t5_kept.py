"""T5's bias beside RoPE's high frequencies, which go on rotating; calibrated."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm(
    "t5-kept",
    "T5 bias beside RoPE's high frequencies, calibrated",
    number="frequencies kept",
    keep_frequencies="auto",
)
