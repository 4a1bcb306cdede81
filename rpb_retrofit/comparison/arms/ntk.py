"""NTK-aware scaling: a larger base, so that the slowest rotation is a factor slower and the fastest is as before."""

from __future__ import annotations

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.rope import ntk_base, scaled

ARM = Arm(
    "ntk",
    "RoPE with a larger base, by the factor at the lowest frequency (NTK-aware scaling, as in arXiv:2309.00071)",
    scaled(lambda factor, base, context, rotating: {"rope_theta": ntk_base(base, factor, rotating)}),
    number="factor",
)
