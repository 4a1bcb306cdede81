"""What training reads and minimises: recipes, documents, packing, resuming, masks, against plain references."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of
from rpb_retrofit.text import special_tokens
from rpb_retrofit.training.batches import IGNORED, Layout, Rows, collate, layout_of, pairs_by_bucket
from rpb_retrofit.training.divergence import divergence
from rpb_retrofit.training.documents import Finite, Mixture, Streaming, hold_out, open_sources
from rpb_retrofit.training.guard import RECENT, Guard
from rpb_retrofit.training.objective import Objective, masked
from rpb_retrofit.training.parameters import groups, prepare, rate_factor
from rpb_retrofit.training.recipe import Recipe, Stage, read_recipe
from tests.families.cases import CASES
from tests.support.command import rpb_command
from tests.support.tiny_models import retrofitted
from tests.support.training_cases import small_tokenizer

NOTHING = torch.empty(0, dtype=torch.long)
PACKED, PADDED = (Layout(packed, True, NOTHING, NOTHING, 0) for packed in (True, False))


def numbers(documents: Sequence[str]) -> list[Tensor]:
    return [torch.tensor([int(n) for n in document.split()], dtype=torch.long) for document in documents]


def stream(sizes: list[int], layout: Layout = PACKED, seed: int = 0) -> Rows:
    """Documents whose tokens are all different: token 1000 d + i is the i-th of document d."""
    documents = [" ".join(str(1000 * (d + 1) + i) for i in range(size)) for d, size in enumerate(sizes)]
    return Rows(Mixture([Finite("numbers", documents, seed)], [1.0], numbers), layout)


def test_documents_are_tokenised_many_at_a_time() -> None:
    documents, calls = [f"{n} {n}" for n in range(50)], list[int]()

    def encode(texts: Sequence[str]) -> list[Tensor]:
        calls.append(len(texts))
        return numbers(texts)

    mixture = Mixture([Finite("numbers", documents, 0)], [1.0], encode)
    found = [int(mixture.next()[0]) for _ in range(100)]
    assert sorted(found[:50]) == sorted(found[50:]) == list(range(50)) and found[:50] != found[50:]
    assert calls == [50], "all that is left of an epoch, and nothing twice"


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("batch_token: 3", "unknown key 'batch_token': did you mean 'batch_tokens'?"),
        ("stages: [{tokens: 8, rates: 1}]", "unknown key 'stages.0.rates': did you mean 'rate'?"),
        ("stages: [{train: heads, tokens: 8}]", "stages.0.train='heads': input should be 'tables', 'lora' or 'all'"),
        ("stages: []", "stages=[]: list should have at least 1 item"),
        ("stages: [{tokens: -1}]", "stages.0.tokens=-1: input should be greater than 0"),
        ("stages: [{tokens: 9, rate: .inf}]", "stages.0.rate=inf: input should be a finite number"),
        (
            "stages: [{tokens: 9, lengths: {1: 1}}]",
            "stages.0.lengths.1=1: input should be greater than or equal to 2",
        ),
        ("batch_tokens: 256", "batch_tokens=256 holds no sequence of 512 tokens: raise it"),
        ("data: [{name: a, weight: 0}]", "data.0.weight=0: input should be greater than 0"),
        ("{relations: 1, objective: next-token}", "relations=1.0 needs objective=distillation, not next-token"),
        ("{relations: 1, compile: true}", "relations=1.0 and compile=True: attention is not handed out of a graph"),
        ("seed: one", "seed='one': input should be a valid integer"),
        ("[1, 2]", "holds a list, not keys with values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe(settings: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(settings)
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_changes_on_the_command_line(tmp_path: Path) -> None:
    recipe = read_recipe(None, {"stages.1.tokens": 10_000, "data": [{"name": "a.txt"}], "data.0.weight": 2})
    assert recipe.stages[1].tokens == 10_000 and recipe.stages[0] == Recipe().stages[0]
    assert recipe.data[0].weight == 2
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "resolved.yaml") == recipe
    for key in ("stages.7.tokens", "stages.x.tokens", "seed.0"):
        with pytest.raises(ConfigError, match=f"there is no '{key}'"):
            read_recipe(None, {key: 1})


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["--show-recipe", "--set", "seed=7", "--json", tmp_path / "j.json"]
    assert rpb_command(monkeypatch, "finetune", "R", "OUT", *shown) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "j.json").read_text())["seed"] == 7
    for arguments, said in [
        (["--set", "seed"], "--set seed: give KEY=VALUE"),
        (["--control", "--arms", "retrofit"], "--control and --arms retrofit: give one of the two"),
        (["--arms", "teacher"], "arm 'teacher': choose retrofit, control, or retrofit,control"),
        (["--recipe", str(tmp_path / "none.yaml")], "cannot be read: No such file"),
        ([], "'./R': no such folder"),
    ]:
        assert rpb_command(monkeypatch, "finetune", "./R", tmp_path / "OUT", *arguments) == 2, arguments
        assert said in capsys.readouterr().err


# --- documents -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.lists(st.integers(2, 17), min_size=1, max_size=12))
def test_packing_keeps_every_token_in_order(sizes: list[int], lengths: list[int]) -> None:
    rows, seen = stream(sizes), []
    for length in lengths:
        (row,) = rows.take(1, length)
        assert sum(map(len, row)) == length, "a packed row is full"
        batch = collate([row], length, PACKED)
        assert batch.position_ids is not None
        for i, (token, position, target) in enumerate(
            zip(batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), batch.target[0].tolist(), strict=True)
        ):
            starts = position == 0
            assert starts == (i == 0 or token != batch.input_ids[0, i - 1] + 1 or token % 1000 == 0)
            follows = i + 1 < length and batch.position_ids[0, i + 1] > 0
            assert target == (batch.input_ids[0, i + 1] if follows else IGNORED)
        seen += batch.input_ids[0].tolist()
    # One epoch holds each token once, its documents whole.
    epoch = seen[: sum(sizes)]
    assert len(set(epoch)) == len(epoch)
    assert all(b == a + 1 or b % 1000 == 0 for a, b in pairwise(epoch))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.lists(st.integers(2, 17), min_size=2, max_size=12),
    st.integers(0, 11),
    st.booleans(),
)
def test_resumes_at_the_very_next_token(sizes: list[int], lengths: list[int], stop: int, packed: bool) -> None:
    layout = PACKED if packed else PADDED
    whole = stream(sizes, layout)
    want = [whole.take(2, length) for length in lengths]
    stop %= len(lengths)
    first = stream(sizes, layout)
    for length in lengths[:stop]:
        first.take(2, length)
    state = json.loads(json.dumps(first.state()))
    second = stream(sizes, layout)
    second.restore(state)
    for rows, length in zip(want[stop:], lengths[stop:], strict=True):
        got = second.take(2, length)
        assert [[part.tolist() for part in row] for row in got] == [[part.tolist() for part in row] for row in rows]


def test_a_stream_resumes_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{10 * i} {10 * i + 1} {10 * i + 2}"}) + "\n" for i in range(7)))

    def opened() -> Rows:
        recipe = Recipe.model_validate({"data": [{"name": str(file), "streaming": True}], "evaluate_tokens": 0})
        (source,), weights, held = open_sources(recipe)
        assert isinstance(source, Streaming) and not held
        return Rows(Mixture([source], weights, numbers), PACKED)

    whole = opened()
    want = [whole.take(1, 5) for _ in range(9)]  # twice through the file
    for stop in range(9):
        first = opened()
        for _ in range(stop):
            first.take(1, 5)
        second = opened()
        second.restore(json.loads(json.dumps(first.state())))
        got = [second.take(1, 5) for _ in range(stop, 9)]
        assert all(torch.equal(torch.cat(a[0]), torch.cat(b[0])) for a, b in zip(got, want[stop:], strict=True))


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4))
def test_weights_of_a_mixture(weights: list[float]) -> None:
    sources = [Finite(str(i), [f"{i} " * 10] * 3, 0) for i in range(len(weights))]
    mixture = Mixture(sources, weights, numbers)
    counts = Counter(int(mixture.next()[0]) for _ in range(400))
    for i, weight in enumerate(weights):
        assert counts[i] == pytest.approx(400 * weight / sum(weights), abs=len(weights))


def test_order_follows_the_seed_and_the_epoch() -> None:
    documents = [str(i) for i in range(50)]

    def epochs(seed: int) -> list[list[str]]:
        source = Finite("", documents, seed)
        return [[source.next() for _ in range(50)] for _ in range(2)]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == sorted(documents) and first != second
    assert epochs(0) == [first, second] and epochs(1)[0] != first


@pytest.mark.parametrize("count", [1, 3, 40, 500])
def test_held_out_text_is_apart(count: int) -> None:
    documents = [f"{i:04d} " * 200 for i in range(count)]
    train, held = hold_out(documents, 0.05)
    texts = [train[i] for i in range(len(train))]
    total, apart = sum(map(len, documents)), sum(map(len, held))
    assert apart / total == pytest.approx(0.05, abs=0.005)
    assert apart + sum(map(len, texts)) == total
    if count >= 40:
        assert not {text[:4] for text in texts} & {text[:4] for text in held}


def test_a_column_of_a_parquet_file(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["1 2 3", "4 5 6"] * 20}).to_parquet(str(tmp_path / "a.parquet"))
    recipe = Recipe.model_validate({"data": [{"name": str(tmp_path / "a.parquet"), "column": "body"}]})
    (source,), _, held = open_sources(recipe)
    assert source.next() in ("1 2 3", "4 5 6") and len(held) == 2
    with pytest.raises(DataError, match="no column 'text', only body"):
        open_sources(Recipe.model_validate({"data": [{"name": str(tmp_path / "a.parquet")}]}))
    Dataset.from_dict({"text": ["", " "]}).to_parquet(str(tmp_path / "blank.parquet"))
    with pytest.raises(DataError, match=r"blank.parquet' holds no text"):
        open_sources(Recipe.model_validate({"data": [{"name": str(tmp_path / "blank.parquet")}]}))
    Dataset.from_dict({"text": [1, 2]}).to_parquet(str(tmp_path / "numbers.parquet"))
    with pytest.raises(DataError, match=r"numbers.parquet' holds int where text is wanted"):
        open_sources(Recipe.model_validate({"data": [{"name": str(tmp_path / "numbers.parquet")}]}))


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": " "}, {"text": "1 2 3"}] * 40
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        data = {"name": str(tmp_path / "rows.jsonl"), "streaming": streaming}
        recipe = Recipe.model_validate({"data": [data], "evaluate_tokens": 0 if streaming else 100})
        (source,), _, held = open_sources(recipe)
        assert {source.next() for _ in range(50)} == {"1 2 3"}
        assert held == ([] if streaming else ["1 2 3"] * 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_not_utf8(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "na\xefve"}\n' * 30)
    data = {"name": str(tmp_path / "rows.jsonl"), "streaming": streaming}
    recipe = Recipe.model_validate({"data": [data], "evaluate_tokens": 0})
    with pytest.raises(DataError, match=r"rows.jsonl' is not UTF-8"):
        next(source.next() for source in open_sources(recipe)[0])


# --- batches and what is minimised ---------------------------------------------------------------------------------

FAMILIES = ("llama", "gpt2", "opt", "bloom", "gpt_neox", "mistral", "qwen3", "gemma2")
CAUSAL = [case for case in CASES if str(case) in FAMILIES]


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_documents_in_a_row_do_not_see_one_another(case: Any) -> None:
    """The loss of packed (or padded) rows is that of each document alone, in every family."""
    model = retrofitted(case).eval()
    layout = layout_of(model, small_tokenizer(), NOTHING, NOTHING)
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
    found = divergence(student, teacher)
    p, log_q = teacher.softmax(-1), student.log_softmax(-1)
    plain = torch.where(p > 0, p * (p.log() - log_q).nan_to_num(0, 0, 0), 0).sum()
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*torch.autograd.grad(found, student), student.softmax(-1).detach() - p)
    again = student.detach().clone().requires_grad_()
    assert not torch.autograd.grad(divergence(again, student.detach()), again)[0].any(), "not even a rounding error"


def test_masked_tokens() -> None:
    tokenizer = small_tokenizer()
    (case,) = (case for case in CASES if str(case) == "bert")
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
    (case,) = (case for case in CASES if str(case) == "llama")
    recipe = Recipe.model_validate({"weight_decay": 0.1})
    model = prepare(retrofitted(case), Stage(tokens=1), recipe, "next-token")
    found = {group["name"]: group for group in groups(model, Stage(tokens=1, rate=1e-4, table_rate=1e-2), recipe)}
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {group: {names[id(p)] for p in found[group]["params"]} for group in found}
    assert all("relative_attention_bias" in name for name in by_name["tables"]) and by_name["tables"]
    assert all("norm" in name for name in by_name["no decay"]) and by_name["no decay"]
    assert set.union(*by_name.values()) == set(names.values())
    assert [(found[g]["lr"], found[g]["weight_decay"]) for g in ("tables", "weights", "no decay")] == [
        (1e-2, 0.0), (1e-4, 0.1), (1e-4, 0.0)
    ]  # fmt: skip


def test_the_guard() -> None:
    guard = Guard(spike=2.0)
    assert guard.complaint(float("nan"), 1.0) == "the loss is nan"
    assert guard.complaint(1.0, float("inf")) == "the norm of the gradients is inf"
    assert guard.complaint(50.0, 1.0) is None, "there is nothing yet to measure a spike from"
    for _ in range(RECENT):
        assert guard.complaint(1.0, 1.0) is None
    assert guard.complaint(2.9, 1.0) is None
    assert "spike=2.0" in (guard.complaint(3.2, 1.0) or "")
    assert Guard(spike=None).complaint(1e9, 1.0) is None
