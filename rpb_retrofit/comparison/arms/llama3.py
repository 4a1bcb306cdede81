"""Llama 3.1's scaling: wavelengths beyond the context interpolated, short ones left, a ramp between."""

from __future__ import annotations

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.rope import scaled

ARM = Arm(
    "llama3",
    "RoPE, wavelengths beyond the context slower by the factor and short ones as they were (Llama 3.1's scaling)",
    scaled(
        lambda factor, base, context, rotating: {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }
    ),
    number="factor",
)
