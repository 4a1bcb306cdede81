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
from rpb_retrofit.runtime.tilings import Tiling, Variant

SHARED_MEMORY = {86: 101_376, 90: 232_448}
"""Bytes that a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

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


class Driver:
    """Triton's view of a GPU of a compute capability, as far as compiling for it takes one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int) -> None:
    available = SHARED_MEMORY[capability]

    triton.runtime.driver.set_active(Driver(capability))

    def measure(kernel: Any, grid: Any, *arguments: Any, tiling: Tiling, variant: Variant) -> None:
        options = {"grid": grid, "num_warps": tiling.warps, "num_stages": tiling.stages}
        compiled = kernel.warmup(*arguments, variant._replace(direct=True), **options)  # a launch but for its end
        print(f"{compiled.metadata.shared} of {available} bytes: {kernel.__name__}, {tiling}", flush=True)

    with patch.object(fused, "shared_memory_of", lambda device: available), patch.object(fused, "_run", measure):
        for width, dtype, mask in CASES[capability]:
            print(f"heads of {width}, {dtype}, mask {None if mask is None else mask.dtype}")
            q, k, v = (torch.empty(1, 4096, heads, width, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
            call = fused.FusedCall(q, k, v, torch.zeros(4, 8191), mask, 0, 0, None, 0.5, 2000)
            out, lse = fused.forward(call)
            fused.backward(call, torch.empty_like(out), out, lse, True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
