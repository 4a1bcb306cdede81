"""Attention with a bias of the offset against float64: every way it runs, forward and backward."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime import attention as engine
from rpb_retrofit.runtime import blockwise, blockwise_gradients
from rpb_retrofit.runtime.attention import attention, backend
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.errors import ConfigError
from rpb_retrofit.runtime.line import bias_matrix, reversed_bias
from rpb_retrofit.runtime.row import decode
from rpb_retrofit.runtime.visibility import dense, pieces_of, runs_of
from tests.support.attention_problem import RUNS, TOLERANCE, Problem, problems, runs, same
from tests.support.memory import most_allocated


@settings(max_examples=200)
@given(problems(st.sampled_from(["none", "window", "gaps", "by head", "by key", *RUNS])), st.booleans())
def test_equal_to_float64(problem: Problem, long: bool) -> None:
    """Caches, static caches' unused slots, grouped heads, widths, dtypes, windows, masks, tables with -inf and 1e4.

    Short, or cut into blocks as long contexts are, at a size that tests can afford.
    """
    with ExitStack() as small:
        if long:
            small.enter_context(patch.multiple(blockwise, LONG=1, FORWARD_QUERIES=100, STEP=24))
            small.enter_context(patch.object(blockwise_gradients, "BACKWARD_QUERIES", 90))
        problem.check()


@settings(max_examples=60)
@given(problems(st.sampled_from(["none", "gaps", *RUNS])), st.sampled_from(["softcap", "sinks", "both", "weights"]))
def test_the_slow_way_equals_float64(problem: Problem, extra: str) -> None:
    if extra in ("softcap", "both"):
        problem.keywords["softcap"] = 5.0
    if extra in ("sinks", "both"):
        problem.keywords["sinks"] = torch.randn(problem.heads)
    problem.keywords["need_weights"] = extra == "weights"
    problem.check()
    attended = problem.solve()
    assert attended.backend == "dense"
    if extra == "weights":
        assert attended.weights is not None
        value = problem.v.repeat_interleave(problem.groups, 1)
        assert torch.allclose((attended.weights @ value).float(), attended.output.float(), atol=1e-2)


@given(st.integers(1, 90), st.integers(0, 9), st.sampled_from(RUNS), st.booleans(), st.integers(0, 2**30))
def test_pieces_hold_every_pair_once(queries: int, earlier: int, kind: str, bidirectional: bool, seed: int) -> None:
    problem = Problem(queries, earlier, batch=3, bidirectional=bidirectional, seed=seed)
    mask = runs(problem, kind)
    want = dense(mask, problem.keys)[:, 0]
    count = torch.zeros_like(want, dtype=torch.int64)
    for piece in pieces_of(mask[:, 0], earlier):
        (low, high), offset = piece.offsets(earlier), problem.offset
        lowest = -(10**9) if piece.lowest is None else piece.lowest
        highest = 10**9 if piece.highest is None else piece.highest
        inside = ((offset >= lowest) & (offset <= highest))[slice(*piece.queries), slice(*piece.keys)]
        count[slice(*piece.rows), slice(*piece.queries), slice(*piece.keys)] += inside
        inner = offset[slice(*piece.queries), slice(*piece.keys)][inside]
        assert inner.min() >= low
        assert inner.max() <= high
    assert torch.equal(count, want.long())
    assert torch.equal(runs_of(lambda start, end: want[:, None, start:end], queries, problem.keys), _canonical(mask))


def _canonical(mask: Tensor) -> Tensor:
    """Empty runs as `runs_of` writes them."""
    empty = mask[..., 1:] <= mask[..., :1]
    return torch.where(empty, torch.zeros_like(mask), mask)


def cuda_like(dtype: torch.dtype, queries: int = 8, keys: int = 8) -> tuple[Any, Any, Any]:
    """Tensors that say that they are on a GPU, which is all that the choice reads."""

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    q, k = torch.randn(1, 2, queries, 16, dtype=dtype), torch.randn(1, 2, keys, 16, dtype=dtype)
    return tuple(x.as_subclass(OnCuda) for x in (q, k, k))


@pytest.mark.parametrize(
    ("dtype", "keywords", "way"),
    [
        (torch.bfloat16, {}, "fused"),
        (torch.float32, {"window": 3}, "fused"),
        (torch.bfloat16, {"causal": False}, "fused"),
        (torch.bfloat16, {"mask": torch.zeros(1, 1, 8, 2, dtype=torch.int32)}, "fused"),
        (torch.bfloat16, {"mask": torch.zeros(1, 1, 8, 8, dtype=torch.bool)}, "fused"),
        (torch.bfloat16, {"mask": torch.zeros(1, 1, 8, 8)}, "dense"),
        (torch.bfloat16, {"dropout": 0.1}, "dense"),
        (torch.float64, {}, "dense"),
    ],
)
def test_what_a_gpu_runs(dtype: torch.dtype, keywords: dict[str, Any], way: str) -> None:
    with patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)):
        assert backend(*cuda_like(dtype), **keywords)[0] == way


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("knows_its_constant", [False, True])
def test_gradients_are_equal_to_the_bit(bidirectional: bool, knows_its_constant: bool) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(3):
            problem = Problem(600, groups=2, bidirectional=bidirectional, knows_its_constant=knows_its_constant)
            inputs = [problem.q, problem.k, problem.v, problem.table.weight]
            gradients.append(torch.autograd.grad(problem.solve().output, inputs, problem.upstream))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], again, strict=True))


@pytest.mark.parametrize("knows_its_constant", [False, True])
def test_memory_grows_with_the_length(knows_its_constant: bool) -> None:
    """A bias of 4,096 x 4,096 alone would be 134 MB; twice the length must not take four times the memory."""

    def train(length: int) -> int:
        problem = Problem(length, batch=1, heads=2, widths=(16, 16), knows_its_constant=knows_its_constant)
        inputs = [problem.q, problem.k, problem.v, problem.table.weight]
        return most_allocated(lambda: torch.autograd.grad(problem.solve().output, inputs, problem.upstream))

    at_2k, at_4k = train(2048), train(4096)
    assert at_4k < 25e6
    assert at_4k < 2.5 * at_2k


def test_the_bias_is_a_view() -> None:
    """The bias of 4,096 x 4,096 takes 8,191 numbers a head."""
    bias = RelativePositionBias(2, Bucketing(8, 16, False))
    with torch.no_grad():
        view = reversed_bias(bias, 4096, 4096, 0, torch.device("cpu"))
    assert view.shape == (2, 4096, 4096)
    assert view.untyped_storage().nbytes() == 2 * 8191 * 4


def test_bias_matrix_is_the_table_by_offset() -> None:
    bias = RelativePositionBias(2, Bucketing(8, 16, True))
    torch.nn.init.normal_(bias.weight)
    matrix = bias_matrix(bias, 3, 5, 2, torch.device("cpu"))
    for i in range(3):
        for j in range(5):
            assert torch.equal(matrix[:, i, j], bias(torch.tensor([2 + i - j]))[:, 0])


@given(st.integers(-60, 200), st.integers(1, 150), st.booleans())
def test_a_range_of_offsets_is_those_offsets(top: int, count: int, bidirectional: bool) -> None:
    bias = RelativePositionBias(3, Bucketing(8, 16, bidirectional))
    torch.nn.init.normal_(bias.weight)
    want = bias(top - torch.arange(count))
    assert torch.equal(bias(range(top, top - count, -1)), want)
    with torch.no_grad():
        assert torch.equal(bias(range(top, top - count, -1)), want)
        assert torch.equal(bias(range(count - 1, -1, -1)), bias(count - 1 - torch.arange(count)))


@given(
    st.sampled_from(list(TOLERANCE)), st.integers(1, 70), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]),
    st.sampled_from([(8, 8), (8, 6)]), st.sampled_from(["normal", "infinite", "huge"]), st.integers(1, 8),
)  # fmt: skip
def test_decoding_takes_a_short_way(
    dtype: torch.dtype, keys: int, groups: int, batch: int, widths: tuple[int, int], values: str, threads: int
) -> None:
    """One query behind all keys, whether its heads are taken by group or, where threads are many, one by one."""
    problem = Problem(1, keys - 1, 0, batch, 4, groups, widths, dtype, values=values)
    want, _ = problem.reference()
    arguments = (problem.q, problem.k, problem.v, problem.table, problem.q.shape[-1] ** -0.5)
    with patch("torch.get_num_threads", return_value=threads), torch.no_grad():
        decoded = decode(*arguments)
    assert decoded is not None and decoded.dtype == dtype and decoded.is_contiguous()
    slack = 1 + problem.table.weight.detach().nan_to_num(neginf=0).abs().max().item() / 10
    same(decoded.transpose(1, 2), want, slack * TOLERANCE[dtype], "output")
    assert decode(*arguments) is None, "it has gradients"
    with torch.no_grad():
        assert decode(*arguments[:3], RelativePositionBias(2, Bucketing(8, 16, False)), 1.0) is None, "other heads"


@pytest.mark.parametrize("change", ["in place", "through data", "through data, one token", "replaced"])
def test_decoding_never_uses_an_old_table(change: str) -> None:
    """A row is kept from token to token; another table, or the next prompt, makes a new one."""
    bias = RelativePositionBias(2, Bucketing(8, 16, False))
    with torch.no_grad():
        bias(range(9, -1, -1))
        new = torch.randn(2, 8)
        if change == "in place":
            bias.weight.copy_(new)
        elif change == "replaced":
            bias.weight = torch.nn.Parameter(new)
        else:
            bias.weight.data.copy_(new)
            bias(range(0, -1, -1) if change.endswith("one token") else range(4, -3, -1))  # the prompt
        assert torch.equal(bias(range(9, -1, -1)), bias(9 - torch.arange(10)))


def test_a_mask_of_lowest_numbers_stays_finite() -> None:
    q, k, v = (torch.randn(1, 1, 3, 4) for _ in range(3))
    bias = RelativePositionBias(1, Bucketing(8, 16, False))
    torch.nn.init.constant_(bias.weight, -3.0)
    lowest = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)
    assert attention(q, k, v, bias, scale=0.5, causal=True, mask=lowest).output.isfinite().all()


def test_dropout_drops_weights() -> None:
    """Its mean over many draws is the output without it; a query on one key keeps or loses it as a whole."""
    problem = Problem(5, batch=1)
    problem.keywords["dropout"] = 0.5
    with torch.no_grad():
        draws = torch.stack([problem.solve().output for _ in range(4000)])
    first = draws[:, 0, :, 0] / problem.v.detach()[0, :, 0]  # (draws, heads, d): 0 or 1 / (1 - p)
    assert torch.allclose(first.unique(), torch.tensor([0.0, 2.0]), atol=1e-4)
    assert (draws.mean(0) - problem.reference()[0]).abs().max() < 0.15


def test_a_slow_way_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_SAID", set())
    problem = Problem(5, keywords={"softcap": 5.0})
    with pytest.warns(UserWarning, match="slow path: scores have a soft cap"):
        problem.solve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.solve()
        assert Problem(5).solve().backend == "blockwise"


def test_blocks_of_keys_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_gradients, "BACKWARD_KEYS", 48)
    Problem(300, earlier=20, groups=2).check()
    Problem(100, bidirectional=True).check()


@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 1, 5, 5, dtype=torch.int32), torch.ones(1, 1, 5, 5, dtype=torch.int64), torch.ones(1, 1, 5, 4) > 0,
     torch.ones(5, 5) > 0, torch.ones(3, 1, 5, 5) > 0],
)  # fmt: skip
def test_a_mask_that_cannot_be(mask: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"an attention mask of shape .* of shape \(2, 4, 5, 5\)"):
        Problem(5, keywords={"mask": mask}).solve()


def test_a_bias_of_other_heads() -> None:
    problem = Problem(5)
    problem.table = RelativePositionBias(3, Bucketing(8, 16, False))
    with pytest.raises(ConfigError, match="the bias has 3 heads and the query 4"):
        problem.solve()
