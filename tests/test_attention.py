"""Attention with a bias of the offset against a float64 einsum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.runtime.attention import attention, bias_matrix
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, allowed: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """float64, one sum at a time. ``bias`` (heads, Q, K), ``allowed`` broadcastable to the scores."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + bias.double()).masked_fill(~allowed, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[None, :, None, None]
    return torch.einsum("bhqk,bhkd->bhqd", weights / total, v)


@given(
    queries=st.integers(1, 40),
    earlier=st.integers(0, 30),
    unused=st.integers(0, 9),
    groups=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bidirectional=st.booleans(),
    masked=st.booleans(),
    extra=st.sampled_from(["none", "softcap", "sinks"]),
    widths=st.sampled_from([(8, 8), (12, 8)]),
    seed=st.integers(0, 2**30),
)
def test_equal_to_float64(
    queries: int,
    earlier: int,
    unused: int,
    groups: int,
    dtype: torch.dtype,
    bidirectional: bool,
    masked: bool,
    extra: str,
    widths: tuple[int, int],
    seed: int,
) -> None:
    """Caches (earlier keys), static caches (unused slots), grouped heads, narrow values, padding, caps and sinks."""
    torch.manual_seed(seed)
    unused = 0 if bidirectional else unused
    keys = earlier + queries + unused
    q = torch.randn(2, 4, queries, widths[0], dtype=dtype)
    k = torch.randn(2, 4 // groups, keys, widths[0], dtype=dtype)
    v = torch.randn(2, 4 // groups, keys, widths[1], dtype=dtype)
    bias = RelativePositionBias(4, Bucketing(8, 16, bidirectional))
    torch.nn.init.normal_(bias.weight)
    offset = earlier + torch.arange(queries)[:, None] - torch.arange(keys)
    allowed = torch.ones_like(offset, dtype=torch.bool) if bidirectional else offset >= 0
    mask = None
    if masked:
        padding = torch.rand(2, 1, 1, keys) < 0.3
        allowed = allowed & ~padding
        allowed = allowed | (offset == 0)  # every row has a key
        mask = allowed
    softcap = 5.0 if extra == "softcap" else None
    sinks = torch.randn(4) if extra == "sinks" else None
    with torch.no_grad():
        got, weights, _ = attention(
            q, k, v, bias, scale=widths[0] ** -0.5, causal=not bidirectional, mask=mask, first_offset=earlier,
            softcap=softcap, sinks=sinks, need_weights=seed % 2 == 0,
        )  # fmt: skip
        matrix = bias(offset.flatten()).view(4, queries, keys)
        want = reference(q, k, v, matrix, allowed, softcap, sinks)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * max(1.0, want.abs().max().item())
    if weights is not None and sinks is None:
        assert torch.allclose(weights.float().sum(-1), torch.ones(2, 4, queries), atol=2e-2)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_equal_float64(bidirectional: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 50, 8, requires_grad=True) for _ in range(3))
    bias = RelativePositionBias(4, Bucketing(8, 16, bidirectional))
    torch.nn.init.normal_(bias.weight)
    out = attention(q, k, v, bias, scale=8**-0.5, causal=not bidirectional).output
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, [q, k, v, bias.weight], upstream)
    offset = torch.arange(50)[:, None] - torch.arange(50)
    allowed = torch.ones_like(offset, dtype=torch.bool) if bidirectional else offset >= 0
    matrix = bias(offset.flatten()).view(4, 50, 50)
    want = torch.autograd.grad(
        reference(q, k, v, matrix, allowed, None, None), [q, k, v, bias.weight], upstream.double()
    )
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_no_n_by_n_bias_is_made() -> None:
    """The bias of 4,096 x 4,096 is a view of 8,191 numbers a head."""
    bias = RelativePositionBias(2, Bucketing(8, 16, False))
    from rpb_retrofit.runtime.attention import reversed_bias

    with torch.no_grad():
        view = reversed_bias(bias, 4096, 4096, 0, torch.device("cpu"))
    assert view.shape == (2, 4096, 4096)
    assert view.untyped_storage().nbytes() == 2 * 8191 * 4


def test_a_row_without_any_key_stays_finite() -> None:
    q, k, v = (torch.randn(1, 1, 3, 4) for _ in range(3))
    bias = RelativePositionBias(1, Bucketing(8, 16, False))
    torch.nn.init.constant_(bias.weight, -3.0)
    for lowest in (torch.zeros(1, 1, 3, 3, dtype=torch.bool), torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min)):
        assert attention(q, k, v, bias, scale=0.5, causal=True, mask=lowest).output.isfinite().all()


def test_bias_matrix_is_the_table_by_offset() -> None:
    bias = RelativePositionBias(2, Bucketing(8, 16, True))
    torch.nn.init.normal_(bias.weight)
    matrix = bias_matrix(bias, 3, 5, 2, torch.device("cpu"))
    for i in range(3):
        for j in range(5):
            assert torch.equal(matrix[:, i, j], bias(torch.tensor([2 + i - j]))[:, 0])
