"""Attention with a bias of the offset against float64: every way it runs, forward and backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime import attention as engine
from rpb_retrofit.runtime import blockwise, flex, split
from rpb_retrofit.runtime.attention import Attended, attention, backend, bias_matrix, reversed_bias
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.runtime.errors import ConfigError
from rpb_retrofit.runtime.visibility import dense, pieces_of, runs_of
from tests.memory import most_allocated

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the largest entry. Float64 tensors have float32 tables."""

TABLE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Problem:
    """One attention with everything that it depends on; `solve` and `reference` say what comes out."""

    queries: int
    earlier: int = 0
    unused: int = 0
    batch: int = 2
    heads: int = 4
    groups: int = 1
    widths: tuple[int, int] = (8, 8)
    dtype: torch.dtype = torch.float32
    bidirectional: bool = False
    values: str = "normal"
    seed: int = 0
    keywords: dict[str, Any] = field(default_factory=dict)
    knows_its_constant: bool = True

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        kv_heads, self.keys = self.heads // self.groups, self.earlier + self.queries + self.unused
        options: dict[str, Any] = {"dtype": self.dtype, "requires_grad": True}
        self.q = torch.randn(self.batch, self.heads, self.queries, self.widths[0], **options)
        self.k = torch.randn(self.batch, kv_heads, self.keys, self.widths[0], **options)
        self.v = torch.randn(self.batch, kv_heads, self.keys, self.widths[1], **options)
        self.upstream = torch.randn(self.batch, self.heads, self.queries, self.widths[1], dtype=self.dtype)
        self.table = RelativePositionBias(self.heads, Bucketing(8, 16, self.bidirectional))
        weight = torch.randn(self.heads, 8)
        if self.values == "infinite":
            weight[torch.rand(self.heads, 8) < 0.3] = -torch.inf
        elif self.values == "huge":
            weight = weight.sign() * 1e4
        self.table.weight.data = weight
        self.offset = self.earlier + torch.arange(self.queries)[:, None] - torch.arange(self.keys)

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    def bias(self) -> Callable[[Tensor], Tensor]:
        return self.table if self.knows_its_constant else lambda offset: self.table(offset)

    def seen(self) -> Tensor:
        """(batch or 1, 1 or heads, Q, K)."""
        mask = self.keywords.get("mask")
        if mask is not None:
            return dense(mask, self.keys) if mask.dtype == torch.int32 else mask
        seen = self.offset >= 0 if self.causal else torch.ones_like(self.offset, dtype=torch.bool)
        if (window := self.keywords.get("window")) is not None:
            seen = seen & (self.offset.abs() < window)
        return seen[None, None]

    def solve(self) -> Attended:
        return attention(
            self.q, self.k, self.v, self.bias(), scale=self.q.shape[-1] ** -0.5, causal=self.causal,
            first_offset=self.earlier, **self.keywords,
        )  # fmt: skip

    def reference(self) -> tuple[Tensor, list[Tensor]]:
        """Output, and the gradients of query, key, value and table, in float64 by plain sums."""
        inputs = [x.detach().double().requires_grad_() for x in (self.q, self.k, self.v, self.table.weight)]
        q, k, v, table = inputs
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        if softcap := self.keywords.get("softcap"):
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + table[:, bucket_of(self.offset, self.table.bucketing)]
        hidden = ~self.seen() | (scores == -torch.inf)
        scores = scores.masked_fill(hidden, -1e300)
        if (sinks := self.keywords.get("sinks")) is not None:
            column = sinks.double().view(1, -1, 1, 1).expand(self.batch, -1, self.queries, 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out = torch.einsum("bhqk,bhkd->bhqd", weights.masked_fill(hidden, 0), v)
        return out.detach(), list(torch.autograd.grad(out, inputs, self.upstream.double()))

    def check(self) -> None:
        """Output and gradients are the reference's, and the way it ran is the one that was promised."""
        want, want_gradients = self.reference()
        slack = 1 + self.table.weight.detach().nan_to_num(neginf=0).abs().max().item() / 10  # rounding of the scores
        attended = self.solve()
        assert attended.output.dtype == self.dtype
        _same(attended.output.detach(), want, slack * TOLERANCE[self.dtype], "output")
        with torch.no_grad():
            _same(self.solve().output, want, slack * TOLERANCE[self.dtype], "output without gradients")
        got = torch.autograd.grad(attended.output, [self.q, self.k, self.v, self.table.weight], self.upstream)
        for name, ours, theirs in zip("qkv", got, want_gradients, strict=False):
            _same(ours, theirs, slack * TOLERANCE[self.dtype], f"d{name}")
        # One query on its one key has no gradient but rounding: measure against what went into the sums.
        floor = 1e-2 * self.upstream.abs().sum().item() ** 0.5
        _same(got[3], want_gradients[3], slack * TABLE_TOLERANCE[self.dtype], "dtable", floor)


def _same(ours: Tensor, theirs: Tensor, tolerance: float, name: str, floor: float = 0.1) -> None:
    assert ours.isfinite().all(), f"{name} is not finite"
    error, size = (ours.double() - theirs).abs().max().item(), max(theirs.abs().max().item(), floor)
    assert error <= tolerance * size, f"{name}: {error:.1e} beside {size:.1e}"


def runs(problem: Problem, kind: str) -> Tensor:
    """Runs of keys, as padding, packing and chunks make them; and without rule."""
    first = torch.zeros(problem.batch, problem.queries, dtype=torch.int64)
    position = problem.earlier + torch.arange(problem.queries)
    last = (position + 1).expand(problem.batch, -1) if problem.causal else torch.full_like(first, problem.keys)
    if kind == "left padding":
        first = first + torch.randint(problem.keys + 1, (problem.batch, 1))
    elif kind == "right padding":
        last = last.clamp(max=torch.randint(problem.keys + 1, (problem.batch, 1)))
    elif kind == "packed":
        start = (torch.rand(problem.batch, problem.queries) < 0.1) * position
        first = start.cummax(1).values
        last = last if problem.causal else torch.maximum(first + 1, last - 3)
    elif kind == "chunks":
        first = (position // 7 * 7).expand(problem.batch, -1)
    elif kind == "window and padding":
        first = (position - 20).clamp(min=0).maximum(torch.randint(problem.keys, (problem.batch, 1)))
    else:
        first = torch.randint(problem.keys, (problem.batch, problem.queries))
    return torch.stack([first, last.maximum(first)], -1)[:, None].to(torch.int32)


RUNS = ("left padding", "right padding", "packed", "chunks", "window and padding", "any")


@st.composite
def problems(draw: st.DrawFn, mask: st.SearchStrategy[str]) -> Problem:
    bidirectional = draw(st.booleans())
    problem = Problem(
        queries=draw(st.sampled_from([1, 2, 17, 64, 255, 257, 300])),
        earlier=draw(st.integers(0, 70)),
        unused=0 if bidirectional else draw(st.sampled_from([0, 0, 9])),
        groups=draw(st.sampled_from([1, 2, 4])),
        widths=draw(st.sampled_from([(8, 8), (12, 8), (8, 16)])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        bidirectional=bidirectional,
        values=draw(st.sampled_from(["normal", "normal", "infinite", "huge"])),
        seed=draw(st.integers(0, 2**30)),
        knows_its_constant=draw(st.booleans()),
    )
    kind = draw(mask)
    shape = (problem.batch, problem.heads if kind == "by head" else 1, problem.queries, problem.keys)
    if kind == "window":
        problem.keywords["window"] = draw(st.integers(1, 100))
    elif kind == "by key":
        problem.keywords["mask"] = torch.rand(problem.batch, 1, 1, problem.keys) < 0.7
    elif kind in ("gaps", "by head"):
        problem.keywords["mask"] = (torch.rand(shape) < 0.5) & ((problem.offset >= 0) | problem.bidirectional)
    elif kind != "none":
        problem.keywords["mask"] = runs(problem, kind)
    return problem


@settings(max_examples=200)
@given(problems(st.sampled_from(["none", "window", "gaps", "by head", "by key", *RUNS])), st.booleans())
def test_equal_to_float64(problem: Problem, long: bool) -> None:
    """Caches, static caches' unused slots, grouped heads, widths, dtypes, windows, masks, tables with -inf and 1e4.

    Short, or cut into blocks as long contexts are, at a size that tests can afford.
    """
    sizes = {"LONG": 1, "FORWARD_QUERIES": 100, "STEP": 24, "BACKWARD_QUERIES": 90} if long else {}
    with ExitStack() as small:
        for name, size in sizes.items():
            small.enter_context(patch.object(blockwise, name, size))
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
        found = offset[slice(*piece.queries), slice(*piece.keys)][inside]
        assert found.min() >= low
        assert found.max() <= high
    assert torch.equal(count, want.long())
    assert torch.equal(runs_of(lambda start, end: want[:, None, start:end], queries, problem.keys), _canonical(mask))


def _canonical(mask: Tensor) -> Tensor:
    """Empty runs as `runs_of` writes them."""
    empty = mask[..., 1:] <= mask[..., :1]
    return torch.where(empty, torch.zeros_like(mask), mask)


@settings(max_examples=25)
@given(st.sampled_from([1, 40, 127, 128, 300, 700]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 2**30))
def test_two_kernels_merged_equal_float64(length: int, groups: int, wide: bool, seed: int) -> None:
    """What runs on CUDA, here on its CPU stand-ins: constant beyond an offset inside, at and outside the length."""
    problem = Problem(length, groups=groups, widths=(16, 16), seed=seed)
    problem.table.bucketing = Bucketing(8, 300 if wide else 128, False)
    reach = min(problem.table.constant_beyond[1], length)
    row = problem.table(torch.arange(reach + 1))
    out = split.attend(problem.q, problem.k, problem.v, row[:, :reach], row[:, reach], 0.25)[0]
    got = torch.autograd.grad(out, [problem.q, problem.k, problem.v, problem.table.weight], problem.upstream)
    want, want_gradients = problem.reference()
    _same(out.detach(), want, 1e-5, "output")
    for name, ours, theirs in zip(["dq", "dk", "dv", "dtable"], got, want_gradients, strict=True):
        _same(ours, theirs, 1e-4, name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["none", "window", "gaps", "by head", "packed", "any"])
def test_flex_attention_equals_float64(kind: str) -> None:
    """Forward only: it has no backward on a CPU."""
    problem = Problem(60, earlier=9, groups=2, widths=(16, 16))
    mask, window = None, 20 if kind == "window" else None
    if kind in ("gaps", "by head"):
        mask = (torch.rand(2, 4 if kind == "by head" else 1, 60, 69) < 0.5) & (problem.offset >= 0)
    elif kind in RUNS:
        mask = runs(problem, kind)
    problem.keywords.update({"mask": mask, "window": window})
    line = problem.table(68 - torch.arange(60 + 69 - 1)).detach()
    inputs = [x.detach() for x in (problem.q, problem.k, problem.v)]
    out = flex.attend(*inputs, line, mask, 9, 0, None if window is None else window - 1, 0.25)
    _same(out, problem.reference()[0], 1e-5, "output")


def cuda_like(dtype: torch.dtype, queries: int = 8, keys: int = 8) -> tuple[Any, Any, Any]:
    """Tensors that say that they are on a GPU, which is all that the choice reads."""

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    q, k = torch.randn(1, 2, queries, 16, dtype=dtype), torch.randn(1, 2, keys, 16, dtype=dtype)
    return tuple(x.as_subclass(OnCuda) for x in (q, k, k))


@pytest.mark.parametrize(
    ("dtype", "keys", "keywords", "way"),
    [
        (torch.bfloat16, 8, {"constant_beyond": (None, 4)}, "split"),
        (torch.bfloat16, 8, {}, "flex"),
        (torch.float32, 8, {"constant_beyond": (None, 4)}, "flex"),
        (torch.bfloat16, 9, {"constant_beyond": (None, 4), "first_offset": 1}, "flex"),
        (torch.bfloat16, 8, {"constant_beyond": (None, 4), "window": 3}, "flex"),
        (torch.bfloat16, 8, {"constant_beyond": (-4, 4), "causal": False}, "flex"),
        (torch.bfloat16, 8, {"mask": torch.zeros(1, 1, 8, 2, dtype=torch.int32)}, "flex"),
        (torch.bfloat16, 8, {"mask": torch.zeros(1, 1, 8, 8)}, "dense"),
        (torch.bfloat16, 8, {"dropout": 0.1}, "dense"),
    ],
)
def test_what_a_gpu_runs(dtype: torch.dtype, keys: int, keywords: dict[str, Any], way: str) -> None:
    assert backend(*cuda_like(dtype, 8, keys), **keywords)[0] == way


def test_a_gpus_table_gradients_are_deterministic_where_asked_for() -> None:
    tensors = cuda_like(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert backend(*tensors)[0] == "dense"
        assert backend(*tensors, bias_gradient=False)[0] == "flex"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("knows_its_constant", [False, True])
def test_gradients_are_equal_to_the_bit(bidirectional: bool, knows_its_constant: bool) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(3):
            problem = Problem(600, groups=2, bidirectional=bidirectional, knows_its_constant=knows_its_constant)
            inputs = [problem.q, problem.k, problem.v, problem.table.weight]
            found.append(torch.autograd.grad(problem.solve().output, inputs, problem.upstream))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


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
        decoded = engine.decode(*arguments)
    assert decoded is not None and decoded.dtype == dtype and decoded.is_contiguous()
    slack = 1 + problem.table.weight.detach().nan_to_num(neginf=0).abs().max().item() / 10
    _same(decoded.transpose(1, 2), want, slack * TOLERANCE[dtype], "output")
    assert engine.decode(*arguments) is None, "it has gradients"
    with torch.no_grad():
        assert engine.decode(*arguments[:3], RelativePositionBias(2, Bucketing(8, 16, False)), 1.0) is None, (
            "other heads"
        )


@pytest.mark.parametrize("change", ["in place", "through data", "replaced"])
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
            bias(range(4, -3, -1))  # the prompt
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
    monkeypatch.setattr(blockwise, "BACKWARD_KEYS", 48)
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
