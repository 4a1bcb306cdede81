"""Compiles the fused kernels for a GPU that need not be there, and says how much shared memory each takes of it.

python -m tests.support.kernel_fit 90
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before torch imports Triton

import torch
from torch import Tensor

from rpb_retrofit.runtime import fused
from rpb_retrofit.runtime.kernels_shared import triton
from rpb_retrofit.runtime.tilings import Options, Tiling

SHARED_MEMORY = {86: 101_376, 90: 232_448}
"""Bytes that a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.uint8: "u8"}

NONE, RUNS, ANY = None, torch.zeros(1, 1, 4096, 2, dtype=torch.int32), torch.zeros(1, 1, 4096, 4096, dtype=torch.bool)

CASES: dict[int, list[tuple[int, torch.dtype, Tensor | None]]] = {
    86: [(128, torch.bfloat16, RUNS), (256, torch.bfloat16, NONE), (128, torch.float32, ANY)],
    90: [
        (64, torch.bfloat16, NONE),
        (128, torch.bfloat16, RUNS),
        (256, torch.bfloat16, NONE),
        (64, torch.float32, ANY),
    ],
}
"""Width of a head, dtype and mask; what takes most of each class of tiles."""


def type_of(value: Any, place: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """An argument's type in a kernel's signature; what is known of it goes into constants and attributes, by place."""
    if isinstance(value, Options) or value is None or (isinstance(value, int) and value == 1):  # Triton's constants
        constants[place] = value
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(type_of(part, (*place, n), constants, attributes) for n, part in enumerate(value))
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, Tensor) or value % 16 == 0:
        attributes[place] = [["tt.divisibility", 16]]
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def shared_memory(kernel: Any, arguments: tuple[Any, ...], tiling: Tiling, capability: int) -> int:
    """Bytes that a kernel takes as it would be launched with these arguments."""
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    signature = {
        name: type_of(value, (n,), constants, attributes)
        for n, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=True))
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
    )
    return compiled.metadata.shared


def main(capability: int) -> None:
    available = SHARED_MEMORY[capability]

    def measure(kernel: Any, grid: Any, *arguments: Any, tiling: Tiling, options: Options) -> None:
        taken = shared_memory(kernel, (*arguments, options._replace(direct=True)), tiling, capability)
        print(f"{taken} of {available} bytes: {kernel.__name__}, {tiling}", flush=True)

    with patch.object(fused, "shared_memory_of", lambda device: available), patch.object(fused, "_run", measure):
        for width, dtype, mask in CASES[capability]:
            print(f"heads of {width}, {dtype}, mask {None if mask is None else mask.dtype}")
            q, k, v = (torch.empty(1, 4096, heads, width, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
            call = fused.FusedCall(q, k, v, torch.zeros(4, 8191), mask, 0, 0, None, 0.5, 2000)
            out, lse = fused.forward(call)
            fused.backward(call, torch.empty_like(out), out, lse, True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
