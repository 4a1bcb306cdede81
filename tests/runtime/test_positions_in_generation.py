"""The bias follows ``position_ids`` in generation: behind cached prefixes, padding, prompts and vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rpb_retrofit.runtime.cached_positions import JUDGED, POSITIONS
from rpb_retrofit.runtime.positions import Positions
from tests.families.cases import Case
from tests.support.positions import RESTARTED, by_steps
from tests.support.tiny_models import closeness, families, retrofitted, tokens, ways

pytestmark = pytest.mark.filterwarnings("ignore:.*(slow path|generation flags):UserWarning", "ignore::FutureWarning")


def padded_chat(model: PreTrainedModel, new: int, **kwargs: Any) -> tuple[Tensor, Any]:
    """A cached beginning, then two texts of unequal length padded on the left: their new tokens, and the cache."""
    beginning, cache = tokens(1, 6).expand(2, -1), DynamicCache(config=model.config)
    model(beginning, past_key_values=cache)
    cache.batch_repeat_interleave(kwargs.get("num_beams", 1))
    text = torch.cat([beginning, tokens(2, 5, seed=4)], 1)
    mask = torch.ones_like(text)
    mask[1, 6:9] = 0
    out = model.generate(
        text, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, **kwargs,
    )  # fmt: skip
    return out.sequences[:, 11:], out.past_key_values


@families("llama", "gpt2", "falcon-rope", "olmo2")  # a sliding window goes by the index, as in Transformers
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_padding_between_a_cached_prefix_and_its_continuation(case: Case, beams: int) -> None:
    model = retrofitted(case, tie_word_embeddings=False)
    new, _ = padded_chat(model, 6, num_beams=beams)
    text = torch.cat([tokens(1, 6), tokens(2, 5, seed=4)[1:, 3:]], 1)
    alone = model.generate(text, max_new_tokens=6, do_sample=False, eos_token_id=None, num_beams=beams)
    assert torch.equal(new[1:], alone[:, 8:])


@torch.no_grad()
def test_generation_needs_no_look_at_each_token(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step of a left-padded batch; a cache goes on knowing its positions when it is over."""
    looks: list[int] = []
    look = Positions._look
    monkeypatch.setattr(Positions, "_look", lambda *args: looks.append(1) or look(*args))
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    out = llama.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert not looks and set(ways(llama)) == {"row"}
    cache = out.past_key_values
    assert getattr(cache, JUDGED) and getattr(cache, POSITIONS)[:, -1].tolist() == [7, 4]
    # By hand, and not where generation would have gone on: both rows repeat their first tokens' positions.
    mask = torch.cat([mask, torch.ones(2, 7, dtype=torch.long)], 1)
    text = torch.cat([out.sequences, tokens(2, 2, seed=9)], 1)
    before = (mask.cumsum(1) - 1).clamp(min=0)[:, :12]
    positions = torch.cat([before, torch.tensor([[0, 1, 2], [3, 4, 5]])], 1)
    want = llama(text, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -3:]
    got = llama(text[:, 12:], attention_mask=mask, position_ids=positions[:, 12:], past_key_values=cache).logits
    assert looks and not getattr(cache, JUDGED)
    assert closeness(got, want) < 1e-5


@torch.no_grad()
def test_generation_from_irregular_positions(llama: PreTrainedModel) -> None:
    """A cache with restarted positions: generation goes on by general steps, equal to full passes."""
    ids, cache = tokens(2, 12), DynamicCache(config=llama.config)
    by_steps(llama, ids, RESTARTED, cache, [12])
    text = torch.cat([ids, tokens(2, 1, seed=8)], 1)
    positions = torch.cat([RESTARTED, torch.tensor([[6], [9]])], 1)
    out = llama.generate(
        text, position_ids=positions, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    for _ in range(4):
        given = {"attention_mask": torch.ones_like(text), "position_ids": positions, "use_cache": False}
        text = torch.cat([text, llama(text, **given).logits[:, -1:].argmax(-1)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    assert torch.equal(out, text)


@families("llama", "gpt2", "falcon-rope")
@torch.no_grad()
def test_generation_from_vectors(case: Case) -> None:
    """Transformers reads in the signature whether a class can begin with vectors in the place of tokens."""
    model, ids = retrofitted(case), tokens(2, 8)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    vectors = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=vectors, **settings), model.generate(ids, **settings)[:, 8:])


@families("llama", "gpt2")
@torch.no_grad()
def test_prefix_tuning_of_a_padded_batch(case: Case) -> None:
    """PEFT puts a filled cache under a generation that began without one, and shifts its positions."""
    model = retrofitted(case)
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    for parameter in peft.prompt_encoder.parameters():
        nn.init.normal_(parameter)
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    both = peft.generate(input_ids=ids, attention_mask=mask, **settings)
    alone = peft.generate(input_ids=ids[1:, 3:], attention_mask=mask[1:, 3:], **settings)
    assert torch.equal(both[1:, 7:], alone[:, 4:])


@torch.no_grad()
def test_a_loop_of_ones_own_over_a_cache_of_generate(llama: PreTrainedModel) -> None:
    """What a generation knew of its ids is over with it."""
    ids = tokens(1, 8)
    out = llama.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    text, cache = torch.cat([out.sequences, tokens(1, 1, seed=5)], 1), out.past_key_values
    assert cache.get_seq_length() == 10
    given = {"position_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    inputs = llama.prepare_inputs_for_generation(text, next_sequence_length=2, past_key_values=cache, **given)
    positions = torch.cat([torch.arange(10), torch.tensor([3, 4])])[None]
    want = llama(text, position_ids=positions, attention_mask=torch.ones_like(text), use_cache=False).logits[:, -2:]
    assert closeness(llama(**inputs).logits, want) < 1e-5
