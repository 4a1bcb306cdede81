"""What training minimises, with which rates, and when a step is bad, against plain references."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.text.tokens import special_tokens
from rpb_retrofit.training.batches import IGNORED, collate, layout_of, pairs_by_bucket
from rpb_retrofit.training.divergence import divergence
from rpb_retrofit.training.loss_monitor import RECENT, LossMonitor
from rpb_retrofit.training.objective import Objective, masked
from rpb_retrofit.training.parameters import groups, prepare, rate_factor
from rpb_retrofit.training.recipe import Recipe, Stage
from tests.families.cases import BY_NAME, Case
from tests.support.tiny_models import families, retrofitted
from tests.support.training_cases import small_tokenizer


@families("llama", "gpt2", "opt", "bloom", "gpt_neox", "mistral", "qwen3", "gemma2")
def test_documents_in_a_row_do_not_see_one_another(case: Case) -> None:
    """The loss of packed (or padded) rows is that of each document alone, in every family."""
    model = retrofitted(case).eval()
    no_tokens = torch.empty(0, dtype=torch.long)
    layout = layout_of(model, small_tokenizer(), no_tokens, no_tokens)
    documents = [torch.randint(5, 60, (size,), generator=torch.Generator().manual_seed(size)) for size in (5, 9, 3, 12)]
    if layout.packed:
        rows = [documents[:3], [documents[3], documents[1][:5]]]
    else:
        rows = [[document] for document in documents]
    objective = Objective("next-token", 0.0, None)
    batch = collate(rows, 17, layout)
    assert batch.scored == sum(len(part) - 1 for row in rows for part in row)
    with torch.no_grad():
        together = objective(model, batch)
        alone = sum(
            torch.nn.functional.cross_entropy(model(input_ids=part[None]).logits[0, :-1], part[1:], reduction="sum")
            for row in rows
            for part in row
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert layout.packed == (str(case) not in ("bloom", "opt"))


def test_divergence() -> None:
    teacher, student = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    teacher[2, 3:] = student[2, 3:] = -torch.inf
    student.requires_grad_()
    result = divergence(student, teacher)
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    plain = torch.where(p > 0, p * (p.log() - log_q).nan_to_num(0, 0, 0), 0).sum()
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(*torch.autograd.grad(result, student), student.softmax(-1).detach() - p)
    again = student.detach().clone().requires_grad_()
    assert not torch.autograd.grad(divergence(again, student.detach()), again)[0].any(), "not even a rounding error"


def test_masked_tokens() -> None:
    tokenizer = small_tokenizer()
    case = BY_NAME["bert"]
    model = retrofitted(case)
    layout = layout_of(model, tokenizer, *special_tokens(tokenizer))
    assert not layout.packed and not layout.causal
    rows = [[torch.randint(5, 60, (400,))] for _ in range(20)]
    rows[0][0][:10] = tokenizer.pad_token_id
    batch = collate(rows, 410, layout)
    hidden = masked(batch, tokenizer, 0.15, "0/0/7")
    chosen = hidden.target != IGNORED
    assert chosen.float().mean() == pytest.approx(0.15 * 400 / 410, abs=0.01)
    assert not chosen[0, :10].any() and not chosen[:, 400:].any()
    assert torch.equal(hidden.target[chosen], batch.input_ids[chosen])
    assert torch.equal(hidden.input_ids[~chosen], batch.input_ids[~chosen])
    assert (hidden.input_ids[chosen] == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.05)
    assert (hidden.input_ids[chosen] == batch.input_ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.04)
    again, other = (masked(batch, tokenizer, 0.15, seed) for seed in ("0/0/7", "0/0/8"))
    assert torch.equal(again.input_ids, hidden.input_ids) and not torch.equal(other.input_ids, hidden.input_ids)


@given(st.lists(st.integers(1, 40), max_size=5), st.sampled_from([4, 8, 32]), st.integers(20, 60), st.booleans())
def test_pairs_by_bucket(lengths: list[int], buckets: int, distance: int, bidirectional: bool) -> None:
    bucketing = Bucketing(buckets, distance, bidirectional)
    want = torch.zeros(buckets, dtype=torch.long)
    for length in lengths:
        at = torch.arange(length)
        offset = at[:, None] - at
        seen = offset if bidirectional else offset[offset >= 0]
        want += torch.bincount(bucket_of(seen.flatten(), bucketing), minlength=buckets)
    assert pairs_by_bucket(Counter(lengths), bucketing) == want.tolist()


def test_rates() -> None:
    stage = Stage(tokens=1, warmup=0.2, decay="cosine")
    factors = [rate_factor(stage, step, 10) for step in range(10)]
    assert factors[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True) and 0 < factors[-1] < 0.1
    assert rate_factor(stage.model_copy(update={"decay": "constant"}), 9, 10) == 1
    assert rate_factor(stage.model_copy(update={"decay": "linear"}), 6, 10) == pytest.approx(0.5)
    assert rate_factor(stage, 0, 1) > 0, "a single step moves"


def test_groups() -> None:
    case = BY_NAME["llama"]
    recipe = Recipe.model_validate({"weight_decay": 0.1})
    model = prepare(retrofitted(case), Stage(tokens=1), recipe, "next-token")
    by_group = {group["name"]: group for group in groups(model, Stage(tokens=1, rate=1e-4, table_rate=1e-2), recipe)}
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {group: {names[id(p)] for p in by_group[group]["params"]} for group in by_group}
    assert all("relative_attention_bias" in name for name in by_name["tables"]) and by_name["tables"]
    assert all("norm" in name for name in by_name["no decay"]) and by_name["no decay"]
    assert set.union(*by_name.values()) == set(names.values())
    assert [(by_group[g]["lr"], by_group[g]["weight_decay"]) for g in ("tables", "weights", "no decay")] == [
        (1e-2, 0.0), (1e-4, 0.1), (1e-4, 0.0)
    ]  # fmt: skip


def test_the_loss_monitor() -> None:
    monitor = LossMonitor(spike=2.0)
    assert monitor.problem(float("nan"), 1.0) == "the loss is nan"
    assert monitor.problem(1.0, float("inf")) == "the norm of the gradients is inf"
    assert monitor.problem(50.0, 1.0) is None, "there is nothing yet to measure a spike from"
    for _ in range(RECENT):
        assert monitor.problem(1.0, 1.0) is None
    assert monitor.problem(2.9, 1.0) is None
    assert "spike=2.0" in (monitor.problem(3.2, 1.0) or "")
    assert LossMonitor(spike=None).problem(1e9, 1.0) is None
