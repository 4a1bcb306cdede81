"""Dynamic NTK: nothing changes within the context; beyond it the base grows with the length of the text.

Transformers' ``_compute_dynamic_ntk_parameters``. Keys that are cached keep the rotation of the length at which they
came in, so decoding across the context is not what one pass computes.
"""

from __future__ import annotations

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.rope import scaled

ARM = Arm(
    "dynamic",
    "RoPE, its base growing with the text beyond the context (Transformers' dynamic NTK)",
    scaled(lambda factor, base, context, rotating: {"rope_type": "dynamic", "factor": factor}),
    number="factor",
)
