"""How the kernels of `fused` cut their work, and what they are compiled for."""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGE = 200 * 2**10
"""Bytes of shared memory from which the large tiles are taken (H100, H200, B200)."""


class Tiling(NamedTuple):
    """How a kernel cuts its work: rows (or keys) of a program, how many of the others at a time; how it is run."""

    block: int
    step: int
    warps: int
    stages: int


class Tilings(NamedTuple):
    """One for each kernel."""

    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling
    line_gradient: Tiling
    wide_line_gradient: Tiling


class Variant(NamedTuple):
    """What a kernel is compiled for.

    ``block`` and ``step`` are its tiling's, ``padded`` and ``value_padded`` the powers of two that tiles have for the
    widths. ``masked`` is 0 without a mask, 1 for runs, 2 for booleans; ``precision`` that of float32 products.
    ``has_far``: the bias has a constant part; ``even``: steps end where the keys (or queries) do; ``direct``: the bias
    is loaded by an instruction of NVIDIA's.
    """

    block: int
    step: int
    width: int
    padded: int
    value_width: int
    value_padded: int
    masked: int
    precision: str
    has_far: bool
    even: bool
    direct: bool


def tilings(width: int, itemsize: int, shared_memory: int) -> Tilings:
    """By the width of a head, the bytes of a number and those of shared memory that a program may have.

    The large ones were measured on an H200. The small ones fit into 99 KiB, as compiled for compute capability 8.6.
    """
    row_bytes = width * itemsize
    if shared_memory < LARGE:
        if row_bytes <= 256:
            return _alike(Tiling(64, 32, 4, 2), Tiling(64, 64, 4, 1))
        return _alike(Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1))
    if itemsize == 4:  # three products in the place of one take room
        return _alike(Tiling(64, 32, 4, 2), Tiling(64, 64, 8, 1))
    if row_bytes <= 128:
        tile = Tiling(64, 64, 4, 3)
        return Tilings(tile, tile, tile, tile, Tiling(128, 128, 8, 2))
    if row_bytes <= 256:
        wide, narrow = Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2)
        return Tilings(wide, wide, narrow, Tiling(64, 64, 8, 2), Tiling(128, 128, 8, 1))
    return _alike(Tiling(64, 32, 4, 2), Tiling(64, 64, 8, 1))


def _alike(tile: Tiling, band: Tiling) -> Tilings:
    return Tilings(tile, tile, tile, band, band)


def shared_memory_of(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def product_precision() -> str:
    """Of float32 products on tensor cores: three make up for a short mantissa, unless PyTorch is told not to mind."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def padded_width(width: int) -> int:
    """The power of two that a kernel's tiles have for a width."""
    return max(16, 1 << (width - 1).bit_length())
