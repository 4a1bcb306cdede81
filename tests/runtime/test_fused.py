"""The GPU's kernels against float64: on a GPU where there is one, else as Triton interprets them on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime import fused, operators, tilings
from rpb_retrofit.runtime.buckets import Bucketing
from tests.support.attention_problem import RUNS, TABLE_TOLERANCE, TOLERANCE, Problem, problems, same

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)[: 2 if DEVICE == "cpu" else 3]
"""The interpreter multiplies no bfloat16."""

LENGTHS = (1, 17, 65, 130) if DEVICE == "cpu" else (1, 17, 64, 257, 600)
"""It takes a tenth of a second for a program, and there is one for every 64 queries of each head."""


def solve(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of query, key, value and table."""
    leaves = [problem.q, problem.k, problem.v, problem.table.weight]
    line = problem.table(problem.earlier + problem.queries - 1 - torch.arange(problem.queries + problem.keys - 1))
    mask, window = problem.keywords.get("mask"), problem.keywords.get("window")
    if mask is not None and mask.shape[2] == 1:
        mask = mask.expand(-1, -1, problem.queries, -1)
    highest = None if window is None else window - 1
    lowest = 0 if problem.causal else None if window is None else -highest
    constant = problem.table.constant_beyond[1] if problem.knows_its_constant else None
    tensors: list[Any] = [None if x is None else x.to(DEVICE) for x in (*leaves[:3], line, mask)]
    out, _ = operators.attend_fused(*tensors, problem.earlier, lowest, highest, problem.q.shape[-1] ** -0.5, constant)
    return out.detach().cpu(), list(torch.autograd.grad(out, leaves, problem.upstream.to(DEVICE)))


def check(problem: Problem) -> None:
    out, got = solve(problem)
    want, want_gradients = problem.reference()
    slack = 1 + problem.table.weight.detach().nan_to_num(neginf=0).abs().max().item() / 10
    same(out, want, slack * TOLERANCE[problem.dtype], "output")
    for name, actual, expected in zip("qkv", got, want_gradients, strict=False):
        same(actual, expected, 2 * slack * TOLERANCE[problem.dtype], f"d{name}")
    floor = 1e-2 * problem.upstream.abs().sum().item() ** 0.5
    same(got[3], want_gradients[3], slack * TABLE_TOLERANCE[problem.dtype], "dtable", floor)


@settings(max_examples=12 if DEVICE == "cpu" else 100)
@given(problems(st.sampled_from(["none", "none", "window", "gaps", "by head", "by key", *RUNS]), DTYPES, LENGTHS))
def test_equal_to_float64(problem: Problem) -> None:
    """As on a CPU: caches, static caches' unused slots, grouped heads, widths, dtypes, windows, masks, tables."""
    check(problem)


@pytest.mark.parametrize("reach", [1, 128, 300, 2000])
def test_far_keys_share_one_constant(reach: int) -> None:
    """Whole tiles of it, a bit of one, and none: beyond an offset at the start, inside and outside the length."""
    problem = Problem(450, groups=2, heads=2, batch=1, widths=(16, 16))
    problem.table.bucketing = Bucketing(8, max(reach, 5), False)
    problem.table.weight.data = torch.randn(2, 8)
    check(problem)


@pytest.mark.parametrize("knows_its_constant", [False, True])
def test_gradients_are_equal_to_the_bit(knows_its_constant: bool) -> None:
    problem = Problem(100, batch=1, groups=2, knows_its_constant=knows_its_constant)
    first, second = solve(problem), solve(problem)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_the_bias_gradient_is_summed_in_parts_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(150, heads=2, bidirectional=True, batch=1)
    whole = solve(problem)[1][3]
    monkeypatch.setattr(fused, "BAND_BYTES", 1)  # one diagonal of tiles at a time
    assert torch.allclose(solve(problem)[1][3], whole, atol=1e-5)


@pytest.mark.parametrize("width", [16, 128])
def test_the_tiles_of_large_gpus(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "shared_memory_of", lambda device: tilings.LARGE)
    monkeypatch.setattr(fused, "WIDE_BAND", 64)
    check(Problem(300, heads=1, batch=1, widths=(width, width), dtype=torch.float16, knows_its_constant=False))


@pytest.mark.parametrize("layout", ["as a model's", "columns apart"])
def test_the_operators_keep_their_promises_to_a_compiler(layout: str) -> None:
    problem = Problem(40, heads=2, batch=1)
    q, k, v = (x.detach() for x in (problem.q, problem.k, problem.v))
    if layout == "columns apart":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    line = problem.table(39 - torch.arange(79)).detach().T.contiguous().T
    arguments: Any = [x.to(DEVICE) for x in (q, k, v, line)]
    rest = (0, 0, None, 0.25, None)
    out, lse = operators.attend_fused(*arguments, None, *rest)
    promises = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.attend_fused, (*arguments, None, *rest), test_utils=promises)
    gradients = (torch.ones_like(out), *arguments, out, lse, None, *rest, True)
    torch.library.opcheck(operators.attend_fused_backward, gradients, test_utils=promises)


@pytest.mark.process
@pytest.mark.parametrize("capability", [86, 90])
def test_the_kernels_compile_and_fit_into_a_gpu(capability: int) -> None:
    """Compiled for an RTX 30 and a Hopper GPU, neither of which need be there."""
    command = [sys.executable, "-m", "tests.support.kernel_fit", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    taken = [line for line in done.stdout.splitlines() if " bytes: " in line]
    assert len(taken) >= 12
    for line in taken:
        used, available = (int(word) for word in line.split(" bytes")[0].split(" of "))
        assert used <= available, line


def test_an_old_precision_switch_and_the_new_one() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert tilings.product_precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert tilings.product_precision() == "tf32x3"


def test_what_the_kernels_cannot_run_is_named() -> None:
    narrow = torch.zeros(1, 1, 4, 64)
    assert fused.obstacle(narrow, narrow) == "there is no faster way on cpu"
