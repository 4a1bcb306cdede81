"""Tables from other checkpoints, and for other buckets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of, offsets_of
from rpb_retrofit.tables.rebucket import rebucket
from tests.families.cases import BY_NAME
from tests.support.tiny_models import CONFIG, build, inputs_of, retrofitted, tokens


def bucketings(bidirectional: st.SearchStrategy[bool]) -> st.SearchStrategy[Bucketing]:
    sizes = st.sampled_from([(8, 20), (32, 128), (64, 128), (12, 500), (64, 2048)])
    return st.builds(lambda size, both: Bucketing(*size, both), sizes, bidirectional)


def table_for(bucketing: Bucketing, seed: int, heads: int = 3) -> Tensor:
    return torch.randn(heads, bucketing.num_buckets, generator=torch.Generator().manual_seed(seed))


@given(bucketings(st.just(False)), bucketings(st.just(False)), st.integers(0, 2**30), st.sampled_from([30, 600]))
def test_rebucketing_keeps_the_function(old: Bucketing, new: Bucketing, seed: int, context: int) -> None:
    """Bit for bit where the old function is constant over a new bucket; else its mean by how often offsets occur."""
    table = table_for(old, seed)
    result, offset, error, _ = rebucket(table, old, new, context)
    for bucket in range(new.num_buckets):
        reach = offsets_of(bucket, new)
        if reach is None or reach.first >= context:
            continue
        last = context - 1 if reach.last is None else min(reach.last, context - 1)
        inside = torch.arange(reach.first, last + 1)
        values, weight = table[:, bucket_of(inside, old)].double(), (context - inside).double()
        if bool((values == values[:, :1]).all()) and (reach.last is not None or reach.first >= old.max_distance):
            assert torch.equal(result[:, bucket].double(), values[:, 0])
        torch.testing.assert_close(
            result[:, bucket].double(), (values * weight).sum(1) / weight.sum(), rtol=1e-5, atol=1e-6
        )
    exact = offset < min(old.num_exact, new.num_exact)
    assert not error[exact].any()
    want = (result[:, bucket_of(offset, new)] - table[:, bucket_of(offset, old)]).abs().amax(0)
    torch.testing.assert_close(error.float(), want)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("context", [100, 4096])
def test_finer_and_back_is_the_same_table(bidirectional: bool, context: int) -> None:
    size = 64 if bidirectional else 32  # each direction has 32 buckets
    old, new = Bucketing(size, 128, bidirectional), Bucketing(2 * size, 128, bidirectional)
    table = table_for(old, 0)
    there = rebucket(table, old, new, context)
    used = sorted(set(bucket_of(torch.arange(-300, 300), old).tolist()))
    assert torch.equal(rebucket(there.table, new, old, context).table[:, used], table[:, used])
    assert not there.error.any(), "each of the new buckets lies in one of the old"


def test_the_half_before_the_query_becomes_causal() -> None:
    both, causal = Bucketing(16, 40, True), Bucketing(8, 40, False)
    table = table_for(both, 0)
    result = rebucket(table, both, causal, 100)
    assert torch.equal(result.table, table[:, :8]) and not result.error.any()
    with pytest.raises(ConfigError, match="causal table says nothing of the keys after the query"):
        rebucket(result.table, causal, both, 100)


@pytest.mark.parametrize("family", ["t5", "umt5"])
@torch.no_grad()
def test_t5s_own_tables_give_t5(family: str, tmp_path: Path) -> None:
    """Reuse is exact: the retrofit of a T5 with its own tables is that T5; so is what revert gives back."""
    case = BY_NAME[family]
    model = build(case)
    want = model(**inputs_of(case, tokens())).logits
    model.save_pretrained(tmp_path)
    config = rpb.RetrofitConfig(init=f"from:{tmp_path}")
    report = rpb.retrofit(model, config)
    assert not report.notes, "nothing had to be converted"
    torch.testing.assert_close(model(**inputs_of(case, tokens())).logits, want, rtol=1e-5, atol=1e-5)
    rpb.revert(model)
    assert torch.equal(model(**inputs_of(case, tokens())).logits, want)
    with pytest.raises(ConfigError, match="take them over with init='from:"):
        rpb.retrofit(model, rpb.RetrofitConfig(), calibration=[tokens()])


def test_from_another_retrofit(tmp_path: Path) -> None:
    """Equal buckets: the tables as they are; other buckets, layers or directions: converted, and said."""
    source = retrofitted(BY_NAME["bart"])
    source.save_pretrained(tmp_path)
    again = build(BY_NAME["bart"])
    config = replace(CONFIG, init=f"from:{tmp_path}")
    report = rpb.retrofit(again, config)
    for name in report.tables:
        assert torch.equal(again.get_parameter(name), source.get_parameter(name))
    llama = build(BY_NAME["llama"], layers=4)
    report = rpb.retrofit(llama, replace(config, relative_attention_num_buckets=6))
    assert [note for note in report.notes if "layer i of 4 takes the table of layer i * 2 // 4" in note]
    assert [note for note in report.notes if "8 buckets to 16 became 6 to 16; the bias changes most, by" in note]
    decoder = source.get_parameter("model.decoder.layers.1.self_attn.relative_attention_bias.weight").detach()
    want = rebucket(decoder, Bucketing(8, 16, False), Bucketing(6, 16, False), 2048).table
    torch.testing.assert_close(llama.get_parameter(report.tables[3]).detach(), want)
    assert "layer i of 4" in str(report)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_cannot_be_converted(name: str, tmp_path: Path) -> None:
    build(BY_NAME["llama"]).save_pretrained(tmp_path / "plain")
    retrofitted(BY_NAME["llama"]).save_pretrained(tmp_path / "causal")
    model = build(BY_NAME[name])
    with pytest.raises(ConfigError, match="a 'llama' without tables of relative positions; take a retrofit or"):
        rpb.retrofit(model, replace(CONFIG, init=f"from:{tmp_path / 'plain'}"))
    if name == "bert":
        with pytest.raises(ConfigError, match="its tables are causal and say nothing of the keys after the query, but"):
            rpb.retrofit(model, replace(CONFIG, init=f"from:{tmp_path / 'causal'}"))
    assert not hasattr(model.config, "rpb_retrofit"), "the model is left as it was"


def test_heads_that_differ_are_mapped_and_said(tmp_path: Path) -> None:
    source = retrofitted(BY_NAME["llama"])
    source.save_pretrained(tmp_path)
    wide = build(BY_NAME["llama"], num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    report = rpb.retrofit(wide, replace(CONFIG, init=f"from:{tmp_path}"))
    assert report.notes == ["causal: head h of 8 takes head h * 4 // 8"]
    widened, narrow = wide.get_parameter(report.tables[0]), source.get_parameter(report.tables[0])
    assert torch.equal(widened, narrow.repeat_interleave(2, 0))
