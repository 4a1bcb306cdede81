"""Generation, whatever the cache: the same tokens as greedy decoding by full passes that know no cache.

A bias of the offset must be told how far the queries are ahead of the keys, and every cache counts that differently: a
static one has slots to spare, a sliding one forgets, assisted decoding takes tokens back. Texts grow beyond the windows
(9) and beyond the tables' maximum distance (16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from tests.families.cases import Case
from tests.support.tiny_models import closeness, families, inputs_of, retrofitted, tokens

DECODERS = (
    "llama", "mistral", "gemma3_text", "gpt2", "bloom", "mpt", "falcon", "falcon-rope", "gpt_oss", "deepseek_v3",
    "llama4_text", "gpt_neox", "bert-decoder",
)  # fmt: skip
SEQ2SEQ = ("bart", "t5")
PROMPT, NEW = 12, 24
pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags:UserWarning")


def without(*names: str) -> tuple[str, ...]:
    """The families but those whose source cannot do the same in Transformers either."""
    return tuple(name for name in DECODERS + SEQ2SEQ if name not in names)


@torch.no_grad()
def generator(case: Case, **kwargs: Any) -> PreTrainedModel:
    """A retrofit that never stops early, and does not repeat itself: an untied head, no favourite among its tokens."""
    model = retrofitted(case, tie_word_embeddings=False, **kwargs)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(model.generation_config, name, None)
    return model


def prompt(case: Case, batch: int = 2, length: int = PROMPT, seed: int = 1) -> Tensor:
    ids = tokens(batch, length, seed)
    if case.kind == "seq2seq":
        ids[:, 0] = 1  # the decoder's start token, which `generate` would put there
    return ids


def generate(case: Case, model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Any:
    inputs = inputs_of(case, ids)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    settings = {"max_new_tokens": NEW, "use_cache": True, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**{**inputs, **settings, **kwargs}, do_sample=False)


def greedy(case: Case, model: PreTrainedModel, ids: Tensor, new: int = NEW) -> tuple[Tensor, Tensor]:
    """The reference: a full pass without a cache for every token. The text and the logits of its new tokens."""
    steps: list[Tensor] = []
    for _ in range(new):
        steps.append(model(**inputs_of(case, ids), use_cache=False).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(steps, 1)


def assert_greedy(case: Case, model: PreTrainedModel, ids: Tensor, out: Any, new: int = NEW) -> None:
    text, logits = greedy(case, model, ids, new)
    assert torch.equal(out.sequences, text)
    assert closeness(torch.stack(out.logits, 1), logits) < 2e-5


@families(*DECODERS, *SEQ2SEQ)
@torch.no_grad()
def test_default_cache(case: Case) -> None:
    model, ids = generator(case), prompt(case)
    out = generate(case, model, ids)
    assert isinstance(out.past_key_values, Cache)
    assert_greedy(case, model, ids, out)
    assert out.sequences[:, PROMPT:].unique().numel() > 3, "a text that repeats itself would not notice a wrong offset"


@families(*without("falcon"))
@torch.no_grad()
def test_static_cache(case: Case) -> None:
    model, ids = generator(case), prompt(case)
    out = generate(case, model, ids, cache_implementation="static")
    cache = out.past_key_values
    assert isinstance(getattr(cache, "self_attention_cache", cache), StaticCache)
    assert_greedy(case, model, ids, out)


@families("mistral", "gemma3_text", "gpt_oss", "llama4_text")
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@torch.no_grad()
def test_sliding_caches_slide(case: Case, implementation: str) -> None:
    """The windows of the families above really are passed: else `test_static_cache` would not test them."""
    out = generate(case, generator(case), prompt(case), cache_implementation=implementation)
    layers = out.past_key_values.layers
    sliding = [layer for layer in layers if layer.is_sliding]
    assert sliding and all(layer.keys.shape[2] <= 9 < layer.get_seq_length() for layer in sliding)


@families(*DECODERS, *SEQ2SEQ)
@torch.no_grad()
def test_beam_search(case: Case) -> None:
    """Beams change places, and their caches with them."""
    model, ids = generator(case), prompt(case)
    cached = generate(case, model, ids, num_beams=3).sequences
    assert torch.equal(cached, generate(case, model, ids, num_beams=3, use_cache=False).sequences)


@families(*DECODERS)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@torch.no_grad()
def test_left_padding(case: Case, implementation: str) -> None:
    if (str(case), implementation) == ("falcon", "static"):
        pytest.skip("Falcon with ALiBi has no static cache")
    model = generator(case)
    prompts = [prompt(case, 1, length, seed=length) for length in (14, 10)]
    batch = torch.cat([torch.nn.functional.pad(ids, (14 - ids.shape[1], 0)) for ids in prompts])
    out = generate(case, model, batch, attention_mask=(batch != 0).long(), cache_implementation=implementation)
    for row, logits, ids in zip(out.sequences, torch.stack(out.logits, 1), prompts, strict=True):
        text, want = greedy(case, model, ids)
        assert torch.equal(row[14 - ids.shape[1] :], text[0])
        assert closeness(logits, want[0]) < 2e-5


@families(*SEQ2SEQ)
@torch.no_grad()
def test_padded_source_texts(case: Case) -> None:
    model = generator(case)
    texts = [tokens(1, 13, seed=5), tokens(1, 9, seed=6)]
    batch = torch.cat([torch.nn.functional.pad(ids, (0, 13 - ids.shape[1])) for ids in texts])
    start = prompt(case)
    both = generate(case, model, start, input_ids=batch, attention_mask=(batch != 0).long())
    for row, ids in enumerate(texts):
        alone = generate(case, model, start[row : row + 1], input_ids=ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(both.sequences[row], alone.sequences[0])


def assert_continues(case: Case, take_back: int, **kwargs: Any) -> None:
    """Generate, take tokens back, say something else, generate on with the same cache."""
    model = generator(case)
    first = generate(case, model, prompt(case), max_new_tokens=8, **kwargs)
    cache = first.past_key_values
    if take_back:
        cache.crop(-take_back)
    ids = torch.cat([first.sequences[:, : cache.get_seq_length()], tokens(2, 5, seed=9)], 1)
    out = generate(case, model, ids, max_new_tokens=NEW - 8, past_key_values=cache)
    assert_greedy(case, model, ids, out, NEW - 8)


@families(*DECODERS)
@torch.no_grad()
def test_continuing_from_a_returned_cache(case: Case) -> None:
    assert_continues(case, take_back=0)


@families(*DECODERS)
@torch.no_grad()
def test_a_cropped_cache(case: Case) -> None:
    cache = DynamicCache(config=generator(case).config)
    cache.activate_past_recording()  # else sliding layers, which forget, refuse to be cropped
    assert_continues(case, take_back=3, past_key_values=cache)


def prompt_lookup(case: Case) -> dict[str, Any]:
    return {"prompt_lookup_num_tokens": 3}


def assistant(case: Case) -> dict[str, Any]:
    return {"assistant_model": generator(case, layers=1, seed=5)}


@families(*DECODERS, *SEQ2SEQ)
@pytest.mark.parametrize("help_of", [prompt_lookup, assistant])
@torch.no_grad()
def test_assisted_decoding(case: Case, help_of: Callable[[Case], dict[str, Any]]) -> None:
    """Candidates arrive as chunks, and those refused are cropped from the cache."""
    model, ids = generator(case), prompt(case, 1)
    ids[:, 6:] = ids[:, :6]  # something to look up
    assert_greedy(case, model, ids, generate(case, model, ids, **help_of(case)))


@families(*SEQ2SEQ)
@torch.no_grad()
def test_cropping_the_decoders_cache(case: Case) -> None:
    """`generate` cannot continue an encoder-decoder from a cache (Transformers passes the cached tokens again)."""
    model, ids = generator(case), prompt(case)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    model(**inputs_of(case, ids), past_key_values=cache, use_cache=True)
    cache.crop(-3)
    more = torch.cat([ids[:, :-3], tokens(2, 9, seed=9)], 1)
    got = model(**inputs_of(case, more) | {"decoder_input_ids": more[:, -9:]}, past_key_values=cache, use_cache=True)
    assert closeness(got.logits, model(**inputs_of(case, more), use_cache=False).logits[:, -9:]) < 1e-5
