"""LongRoPE's form, without its search: one set of factors within the context and another beyond it.

Ding et al. 2024, arXiv:2402.13753, search for the factors; here those beyond the context are NTK's, and those within it
are 1, so that short texts lose nothing but the score factor's share.
"""

from __future__ import annotations

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.rope import ntk_factors, scaled

ARM = Arm(
    "longrope",
    "RoPE as it was for short texts, NTK's factors for longer ones, with a score factor (LongRoPE's form without its "
    "search, arXiv:2402.13753)",
    scaled(
        lambda factor, base, context, rotating: {
            "rope_type": "longrope",
            "factor": factor,
            "short_factor": [1.0] * (rotating // 2),
            "long_factor": ntk_factors(factor, rotating),
            "original_max_position_embeddings": context,
        }
    ),
    number="factor",
)
