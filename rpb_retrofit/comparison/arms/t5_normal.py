"""T5's bias as Transformers initialises it."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm("t5-normal", "T5 bias, tables drawn as Transformers initialises T5", usual=False, init="normal")
