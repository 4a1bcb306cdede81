"""YaRN: low frequencies interpolated, high ones left, and a score factor. Peng et al. 2023, arXiv:2309.00071."""

from __future__ import annotations

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.rope import scaled

ARM = Arm(
    "yarn",
    "RoPE, low frequencies slower by the factor and high ones as they were, with a score factor (YaRN, "
    "arXiv:2309.00071)",
    scaled(
        lambda factor, base, context, rotating: {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": context,
        }
    ),
    number="factor",
)
