"""Position interpolation: every rotation a factor slower. Chen et al. 2023, arXiv:2306.15595."""

from __future__ import annotations

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.rope import scaled

ARM = Arm(
    "linear",
    "RoPE, every rotation slower by the factor (position interpolation, arXiv:2306.15595)",
    scaled(lambda factor, base, context, rotating: {"rope_type": "linear", "factor": factor}),
    number="factor",
)
