"""T5's bias that begins as ALiBi, with a logarithmic tail."""

from __future__ import annotations

from rpb_retrofit.comparison.t5 import t5_arm

ARM = t5_arm(
    "t5-alibi", "T5 bias with a logarithmic tail, tables as ALiBi's slopes", usual=False, init="alibi", tail="log"
)
