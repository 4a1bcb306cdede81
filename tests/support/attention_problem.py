"""An attention with a bias of the offset, and the same in float64 by plain sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime.attention import Attended, attention
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.runtime.visibility import dense

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the largest entry. Float64 tensors have float32 tables."""

TABLE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 17, 64, 255, 257, 300)


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
        same(attended.output.detach(), want, slack * TOLERANCE[self.dtype], "output")
        with torch.no_grad():
            same(self.solve().output, want, slack * TOLERANCE[self.dtype], "output without gradients")
        got = torch.autograd.grad(attended.output, [self.q, self.k, self.v, self.table.weight], self.upstream)
        for name, actual, expected in zip("qkv", got, want_gradients, strict=False):
            same(actual, expected, slack * TOLERANCE[self.dtype], f"d{name}")
        # One query on its one key has no gradient but rounding: measure against what went into the sums.
        floor = 1e-2 * self.upstream.abs().sum().item() ** 0.5
        same(got[3], want_gradients[3], slack * TABLE_TOLERANCE[self.dtype], "dtable", floor)


def same(actual: Tensor, expected: Tensor, tolerance: float, name: str, floor: float = 0.1) -> None:
    assert actual.isfinite().all(), f"{name} is not finite"
    error, size = (actual.double() - expected).abs().max().item(), max(expected.abs().max().item(), floor)
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
def problems(
    draw: st.DrawFn,
    mask: st.SearchStrategy[str],
    dtypes: Sequence[torch.dtype] = DTYPES,
    lengths: Sequence[int] = LENGTHS,
) -> Problem:
    bidirectional = draw(st.booleans())
    problem = Problem(
        queries=draw(st.sampled_from(lengths)),
        earlier=draw(st.integers(0, 70)),
        unused=0 if bidirectional else draw(st.sampled_from([0, 0, 9])),
        groups=draw(st.sampled_from([1, 2, 4])),
        widths=draw(st.sampled_from([(8, 8), (12, 8), (8, 16)])),
        dtype=draw(st.sampled_from(dtypes)),
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
