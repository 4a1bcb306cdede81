"""The logarithmic tail: T5 exactly until it is used, in the formula, in whole models, and on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rpb_retrofit as rpb
from rpb_retrofit.runtime.attention import attention
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing, first_distances
from rpb_retrofit.tables import INITIALISATIONS
from rpb_retrofit.tables.alibi import slopes
from rpb_retrofit.tables.rebucket import rebucket
from rpb_retrofit.tables.table_spec import TableSpec
from tests.families.cases import BY_NAME
from tests.support.calibration import calibration_windows
from tests.support.tiny_models import CONFIG, build, inputs_of, tokens

LOG = replace(CONFIG, tail="log")


def bias_with_tail(bidirectional: bool, seed: int = 0) -> RelativePositionBias:
    generator = torch.Generator().manual_seed(seed)
    bias = RelativePositionBias(3, Bucketing(8, 20, bidirectional), tail=True)
    for parameter in bias.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    bias.tail.data = -bias.tail.abs()
    return bias


@given(st.booleans(), st.integers(-5000, 5000), st.integers(0, 2**30))
def test_the_formula(bidirectional: bool, offset: int, seed: int) -> None:
    bias = bias_with_tail(bidirectional, seed)
    flat = RelativePositionBias(3, bias.bucketing)
    flat.weight = bias.weight
    distance = abs(offset) if bidirectional else max(offset, 0)
    slope = bias.tail[:, 1 if bidirectional and offset < 0 else 0]
    want = flat(torch.tensor([offset]))[:, 0] + slope * max(math.log(max(distance, 1) / 20), 0)
    torch.testing.assert_close(bias(torch.tensor([offset]))[:, 0], want)
    with torch.no_grad():
        row = bias(range(distance, -1, -1))  # as decoding reads it
        torch.testing.assert_close(row, bias(torch.arange(distance, -1, -1)))


@torch.no_grad()
def test_a_row_that_is_kept_notices_a_changed_slope() -> None:
    bias = bias_with_tail(False)
    before = bias(range(60, -1, -1)).clone()
    bias.tail.sub_(1)
    assert (bias(range(60, -1, -1)) - before)[:, 0].allclose(-torch.tensor(math.log(3)))


def test_it_never_rises_and_comes_back() -> None:
    """A slope above zero counts as zero; descent lowers it where that helps, and raises none that is above."""
    bias = bias_with_tail(False)
    offsets = torch.arange(100)
    bias.tail.data[:] = 0.0
    flat = bias(offsets).detach()
    bias.tail.data[:] = torch.tensor([[2.0], [0.0], [-1.0]])
    torch.testing.assert_close(bias(offsets)[:2], flat[:2])
    assert bias(offsets)[2, 99] < flat[2, 99]
    for sign, reached in ((1, [True, True, True]), (-1, [False, True, True])):
        bias.tail.grad = None
        (sign * bias(offsets).sum()).backward()
        assert (bias.tail.grad[:, 0] != 0).tolist() == reached


@pytest.mark.parametrize("bidirectional", [False, True])
def test_its_gradient(bidirectional: bool) -> None:
    """Through the engine, against finite differences in float64."""
    bias = bias_with_tail(bidirectional)
    q, k, v = torch.randn(3, 1, 3, 90, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        return (attention(q, k, v, bias, scale=0.3, causal=not bidirectional).output * v).sum()

    run().backward()
    for index in range(bias.tail.numel()):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                bias.tail.view(-1)[index] += sign * 1e-2
                sides.append(run().item())
                bias.tail.view(-1)[index] -= sign * 1e-2
        assert bias.tail.grad.view(-1)[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert", "bart", "bloom"])
def test_in_a_model(name: str, tmp_path: Path) -> None:
    """At slope zero it is the flat retrofit; saved and loaded it is what it was; revert is exact."""
    case = BY_NAME[name]
    flat, model, source = build(case), build(case), build(case)
    rpb.retrofit(flat, replace(CONFIG, init="normal"))
    report = rpb.retrofit(model, replace(LOG, init="normal"))
    assert report.parameters_added == sum(p.numel() for n, p in model.named_parameters() if "relative_attention" in n)
    with torch.no_grad():
        same = model(**inputs_of(case, tokens(2, 40))).logits
        assert torch.equal(same, flat(**inputs_of(case, tokens(2, 40))).logits)
        for module in model.modules():
            if isinstance(module, RelativePositionBias):
                module.tail.normal_(generator=torch.Generator().manual_seed(2))
        other = model(**inputs_of(case, tokens(2, 40))).logits
        assert not torch.allclose(other, same, atol=1e-3)
        model.save_pretrained(tmp_path)
        assert torch.equal(rpb.load(tmp_path).eval()(**inputs_of(case, tokens(2, 40))).logits, other)
        rpb.revert(model)
        want = source(**inputs_of(case, tokens())).logits
        assert torch.equal(model(**inputs_of(case, tokens())).logits, want)


def test_calibration_fits_it() -> None:
    """Two windows that reach three times the maximum distance: slopes that are not zero, and nearer outputs."""
    missed = {}
    for tail in ("flat", "log"):
        model = build(BY_NAME["llama"])
        report = rpb.retrofit(model, replace(CONFIG, init="calibrated", tail=tail), calibration_windows())
        missed[tail] = sum(sum(layer.missed) for layer in report.calibration.layers)
    assert missed["log"] < missed["flat"]
    tails = [m.tail for m in model.modules() if isinstance(m, RelativePositionBias)]
    assert all(tail.min() < -1e-3 and tail.max() <= 0 for tail in tails)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_alibi_goes_on(bidirectional: bool) -> None:
    """From the maximum distance on as steeply as ALiBi is there; no jump larger than inside the last bucket."""
    bucketing = Bucketing(32, 128, bidirectional)
    start = INITIALISATIONS["alibi"](TableSpec(8, bucketing, 64, 2048, 0, tail=True))
    bias = RelativePositionBias(8, bucketing, tail=True)
    bias.weight.data, bias.tail.data = start.table, start.slopes
    line = bias(torch.tensor([128, 129, 256]))
    slope = -torch.tensor(slopes(8))
    torch.testing.assert_close(line[:, 1] - line[:, 0], slope * 128 * math.log(129 / 128))
    assert ((line[:, 0] - slope * 128).abs() <= -slope * (128 - first_distances(bucketing)[-1])).all()
    assert INITIALISATIONS["alibi"](TableSpec(8, bucketing, 64, 2048, 0)).slopes is None


@given(st.sampled_from([(8, 20), (32, 128), (12, 500)]), st.booleans(), st.integers(0, 2**30))
def test_rebucketing_with_a_tail(size: tuple[int, int], tail: bool, seed: int) -> None:
    """Where the new reach is the longer one the function beyond it is the same; flattened, it is the mean."""
    old, new, context = Bucketing(8, 20, False), Bucketing(*size, False), 3000
    generator = torch.Generator().manual_seed(seed)
    table, slope = torch.randn(2, 8, generator=generator), torch.randn(2, 1, generator=generator)
    moved = rebucket(table, old, new, context, slope, tail)
    before = RelativePositionBias(2, old, tail=True)
    before.weight.data, before.tail.data = table, slope
    after = RelativePositionBias(2, new, tail=tail)
    after.weight.data = moved.table
    if tail:
        after.tail.data = moved.slopes
    far = torch.arange(3 * size[1], context)
    difference = after(far) - before(far)
    if tail:  # a constant between them: the last bucket also stands for offsets inside the maximum distance
        torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-4)
    else:
        assert moved.slopes is None and bool((after(far) == after(far)[:, :1]).all())
    want = (after(moved.offset) - before(moved.offset)).abs().amax(0)
    torch.testing.assert_close(moved.error.float().expand_as(want), want, rtol=1e-4, atol=1e-4)


def test_from_a_retrofit_with_a_tail(tmp_path: Path) -> None:
    model = build(BY_NAME["llama"])
    rpb.retrofit(model, replace(LOG, init="alibi"))
    model.save_pretrained(tmp_path)
    again, flat = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    report = rpb.retrofit(again, replace(LOG, init=f"from:{tmp_path}"))
    assert not report.notes
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    (note,) = rpb.retrofit(flat, replace(CONFIG, init=f"from:{tmp_path}")).notes
    assert "without the tail; the bias changes most, by" in note
