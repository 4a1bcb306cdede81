"""The bias follows ``position_ids``: against float64 references, in caches, in heads, and in their arithmetic."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.cached_positions import POSITIONS, extended
from rpb_retrofit.runtime.positions import Positions
from tests.families.cases import BY_NAME, CASES, Case
from tests.families.reference import float64_copy, with_bias
from tests.support.positions import RESTARTED, by_steps
from tests.support.tiny_models import MAX_DISTANCE, build, closeness, families, retrofitted, tokens, ways

DECODERS = ("llama", "mistral", "gemma3_text", "gpt2", "falcon-rope", "llama4_text", "bert-decoder")
pytestmark = pytest.mark.filterwarnings("ignore:.*(slow path|generation flags):UserWarning", "ignore::FutureWarning")


@families("llama", "llama4_text", "gpt2", "falcon", "bert", "modernbert", "distilbert", "deepseek_v3")
@pytest.mark.parametrize("kind", ["restarted", "random", "far apart"])
@torch.no_grad()
def test_any_positions_equal_the_float64_reference(case: Case, kind: str) -> None:
    source, model, ids = build(case), retrofitted(case), tokens(2, 12)
    random = torch.Generator().manual_seed(5)
    positions = {
        "restarted": RESTARTED,
        "random": torch.randint(0, 30, (2, 12), generator=random),
        "far apart": torch.arange(12)[None] * torch.tensor([[3], [7]]),
    }[kind]
    tables = {
        n: m.relative_attention_bias.weight for n, m in model.named_modules() if hasattr(m, "relative_attention_bias")
    }
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    reference = float64_copy(case, source)
    with with_bias(case, reference, tables, MAX_DISTANCE, positions):
        want = reference(**{**given, "position_ids": positions.clamp(max=20)}).logits
    got = model(**given).logits.double()
    assert closeness(got, want) < 2e-5
    assert closeness(model(ids, attention_mask=torch.ones_like(ids)).logits.double(), want) > 1e-3


CACHES: dict[str, Callable[[Any], Cache | None]] = {
    "the model's own": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


@families(*DECODERS)
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_cached_keys_keep_their_positions(case: Case, cache: str) -> None:
    model, ids = retrofitted(case), tokens(2, 12)
    want = model(ids, attention_mask=torch.ones_like(ids), position_ids=RESTARTED, use_cache=False).logits
    got = by_steps(model, ids, RESTARTED, CACHES[cache](model.config), [5, 6, 7, 9, 10, 11, 12])
    assert closeness(got, want) < 1e-5


@torch.no_grad()
def test_positions_follow_the_rows_of_a_cache(llama: PreTrainedModel) -> None:
    """Reordered, repeated, selected, cropped, copied and pickled caches go on as if they had been filled so."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    want = llama(ids, attention_mask=mask, position_ids=RESTARTED, use_cache=False).logits[:, -3:]

    def filled(until: int = 9) -> Any:
        cache = DynamicCache(config=llama.config)
        by_steps(llama, ids[:, :until], RESTARTED[:, :until], cache, [6, until])
        return cache

    def ended(cache: Any, rows: Tensor) -> None:
        given = {"attention_mask": mask[rows], "position_ids": RESTARTED[rows, 9:], "past_key_values": cache}
        assert closeness(llama(ids[rows, 9:], **given).logits, want[rows]) < 1e-5

    cache = filled()
    cache.reorder_cache(torch.tensor([1, 0]))
    ended(cache, torch.tensor([1, 0]))
    cache = filled()
    cache.batch_repeat_interleave(2)
    ended(cache, torch.tensor([0, 0, 1, 1]))
    cache.crop(-3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    ended(cache, torch.tensor([1, 0]))
    cache = filled(12)
    cache.crop(-3)
    ended(copy.deepcopy(cache), torch.arange(2))
    ended(pickle.loads(pickle.dumps(cache)), torch.arange(2))
    cache.reset()
    by_steps(llama, ids[:, :9], RESTARTED[:, :9], cache, [9])
    ended(cache, torch.arange(2))
    with pytest.raises(ConfigError, match=r"position_ids of 2 rows, and the batch has 3.*batch_repeat_interleave"):
        llama(tokens(3, 1), past_key_values=filled(), position_ids=torch.tensor([[9]]))


@torch.no_grad()
def test_without_position_ids_positions_are_the_indices_again(llama: PreTrainedModel) -> None:
    """As in Transformers: what a caller leaves out goes on from the number of cached tokens."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    positions = torch.cat([torch.arange(9) % 5, torch.arange(9, 12)])[None]
    want = llama(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -3:]
    cache = DynamicCache(config=llama.config)
    by_steps(llama, ids[:, :9], positions[:, :9], cache, [9])
    assert closeness(llama(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits, want) < 1e-5


@torch.no_grad()
def test_kept_frequencies_and_bias_follow_alike() -> None:
    """Two branches behind a shared prefix, with half of the rotary frequencies kept."""
    model = build(BY_NAME["llama"])
    config = rpb.RetrofitConfig(init="zeros", keep_frequencies=2, relative_attention_num_buckets=8)
    report = rpb.retrofit(model, config)
    for name in report.tables:
        nn.init.normal_(model.get_parameter(name))
    ids, mask = tokens(1, 8), torch.ones(8, 8, dtype=torch.bool).tril()
    mask[6:, 4:6] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    got = model(ids, position_ids=positions, attention_mask=mask[None, None]).logits[:, 6:]
    assert closeness(got, model(ids[:, [0, 1, 2, 3, 6, 7]]).logits[:, 4:]) < 1e-5


@families("llama", "mistral", "gpt2", "bert-decoder")
@pytest.mark.parametrize("shift", ["left padding", "from 100 on"])
@torch.no_grad()
def test_the_fast_way_stays(case: Case, shift: str) -> None:
    """Positions that are the index less a constant of the row, given by hand, in one pass and token by token."""
    model, ids = retrofitted(case), tokens(2, 12)
    mask = torch.ones_like(ids)
    if shift == "left padding":
        mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0) + (100 if shift == "from 100 on" else 0)
    want = model(ids, attention_mask=mask).logits
    cache, steps, ways_taken = DynamicCache(config=model.config), [], []
    for start, end in ((0, 7), (7, 10), (10, 11), (11, 12)):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], "past_key_values": cache}
        steps.append(model(ids[:, start:end], **given).logits)
        ways_taken.append(set(ways(model)))
    assert ways_taken == [{"blockwise"}, {"blockwise"}, {"row"}, {"row"}]
    assert closeness(torch.cat(steps, 1)[mask.bool()], want[mask.bool()]) < 1e-5


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(1, 4, dtype=torch.long),
        torch.zeros(3, 1, 5, dtype=torch.long),
        torch.zeros(3, 5, dtype=torch.long),
        torch.zeros(1, 5),
        [[0, 1, 2, 3, 4]],
    ],
    ids=lambda x: str(getattr(x, "shape", "list")),
)
def test_what_cannot_be_positions_is_refused(llama: PreTrainedModel, ids: Any) -> None:
    with pytest.raises(ConfigError, match=r"position_ids of .*one for each of the 5 tokens, of shape \(2, 5\) or"):
        llama(tokens(2, 5), position_ids=ids)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_head_that_drops_positions_refuses_them(head: str) -> None:
    """Falcon's heads swallow position_ids, though the model within takes them."""
    case = BY_NAME["falcon-rope"]
    model = getattr(transformers, f"FalconFor{head}")(build(case).config).eval()
    rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    with pytest.raises(ConfigError, match=f"position_ids: RpbFalconFor{head} takes no positions"):
        model(tokens(1, 5), position_ids=torch.arange(5)[None])


@families("falcon", "falcon-rope", "llama")
@torch.no_grad()
def test_positions_survive_copies_between_layers(case: Case) -> None:
    """As where layers are on several devices, and arguments move with them."""
    model, ids = retrofitted(case), tokens(2, 12)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": RESTARTED}
    want = model(ids, **given, use_cache=False).logits

    def copied(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(copied, with_kwargs=True)
    assert closeness(model(ids, **given, use_cache=False).logits, want) < 1e-5
    assert closeness(by_steps(model, ids, RESTARTED, None, [5, 6, 9, 12]), want) < 1e-5


@torch.no_grad()
def test_several_rows_a_sample() -> None:
    """GPT-2's double heads take (batch, choices, tokens), and positions of the same rows."""
    model = transformers.GPT2DoubleHeadsModel(build(BY_NAME["gpt2"]).config).eval()
    rpb.retrofit(model, rpb.RetrofitConfig(init="normal"))
    ids = tokens(2, 12)
    want = model(ids[:, None], use_cache=False).logits[:, 0]
    restarted = model(ids[None], position_ids=RESTARTED, use_cache=False).logits[0]
    assert closeness(model(ids[None], position_ids=torch.arange(12)[None], use_cache=False).logits[0], want) < 1e-5
    assert closeness(restarted, want) > 1e-3


def test_one_query_on_a_device_is_not_looked_at() -> None:
    """Decoding must not wait for a GPU: the general way is taken, whatever the positions are."""
    slots = torch.arange(5, device="meta")[None]
    assert not Positions(slots[:, 4:], slots, 4).are_indices(None, 5, None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_go_on_counting(data: st.DataObject) -> None:
    """`extended` against a plain list: known slots, then slots that count on, then the new ones, which count on."""
    number = st.integers(0, 50)
    known = data.draw(st.lists(number, min_size=1, max_size=6) | st.none())
    past = data.draw(st.integers(0, 9))
    new = data.draw(st.lists(number, min_size=1, max_size=4))
    spare = data.draw(st.integers(0, 3))
    before = list(range(past)) if known is None else known[:past]
    while len(before) < past:
        before.append(before[-1] + 1)
    want = before + new
    for _ in range(spare):
        want.append(want[-1] + 1)
    slots = None if known is None else torch.tensor([known])
    for at in (past, torch.tensor(past)):
        got = extended(slots, torch.tensor([new]), at, past + len(new) + spare)
        assert got.tolist() == [want]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_look_sees_what_each_query_sees(data: st.DataObject) -> None:
    """`Positions.are_indices` of runs, of booleans and of numbers: one answer, that of every visible pair."""
    queries, past = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 4))
    keys = past + queries
    jumps = data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 0, 5]), min_size=keys, max_size=keys))
    slots = torch.tensor([jumps]).cumsum(1)
    ends = [data.draw(st.tuples(st.integers(0, keys), st.integers(0, keys))) for _ in range(queries)]
    runs = torch.tensor([[ends]], dtype=torch.int32)
    at = torch.arange(keys)
    seen = (at >= runs[..., :1]) & (at < runs[..., 1:])
    query, index = slots[:, past:], torch.arange(past, keys)
    right = (index - query[0])[:, None] == (at - slots[0])
    want = bool((right | ~seen[0, 0]).all())
    for mask in (runs, seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)):
        assert Positions(query, slots, past).are_indices(mask, keys, None) == want


@pytest.mark.parametrize("case", CASES, ids=str)
def test_positions_reach_every_attention(case: Case) -> None:
    """No family's attention is left without: the keyword arrives, or the ids that carry what it does."""
    model = retrofitted(case)
    if not Anatomy.of(model).positioned:
        pytest.skip("takes no position_ids")
    arrived = {}

    def arrive(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        arrived[module] = POSITIONS in kwargs or hasattr(kwargs.get("position_ids"), POSITIONS)

    biased = [module for module in model.modules() if hasattr(module, "relative_attention_bias")]
    for module in biased:
        module.register_forward_pre_hook(arrive, with_kwargs=True)
    model(tokens(1, 5), position_ids=torch.arange(5)[None])
    assert arrived == dict.fromkeys(biased, True)
