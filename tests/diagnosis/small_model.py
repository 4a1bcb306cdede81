"""A small model that really uses positions, trained in half a minute on a language in which only they help.

The language: random tokens, of which stretches come again some way on, so that to predict them a model has to find the
same token before and look at the one after it (an induction head, which needs a head for the previous token below it);
and words, fixed runs of tokens, whose order has to be known.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import rpb_retrofit as rpb

VOCAB, CONTEXT = 48, 256
_WORDS, _WORD = 24, 4

SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

ROPE: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", ROPE),
    "qwen2": ("Qwen2ForCausalLM", ROPE),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 128}),
}


def language(tokens: int, seed: int, words: int = 99, kinds: int = 4) -> Tensor:
    """So many tokens of it, (tokens,) int64; other ``words`` are another language."""
    generator = torch.Generator().manual_seed(seed)
    lexicon = torch.randint(VOCAB, (_WORDS, _WORD), generator=torch.Generator().manual_seed(words))

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    text: list[int] = []
    while len(text) < tokens:
        kind = draw(0, kinds)
        if kind == 0:
            text += lexicon[draw(0, _WORDS)].tolist()
        elif kind == 1:
            text += torch.randint(VOCAB, (draw(4, 12),), generator=generator).tolist()
        elif len(text) > 40:
            span = draw(8, 20)
            start = len(text) - draw(span + 1, min(len(text), 120))
            text += text[max(0, start) : max(0, start) + span]
    return torch.tensor(text[:tokens])


def plain_language(tokens: int, seed: int) -> Tensor:
    """The same, but that nothing comes again."""
    return language(tokens, seed, kinds=2)


@cache
def trained(family: str = "llama", seed: int = 0, first: int = 450, then: int = 250) -> PreTrainedModel:
    """A model of the family: ``first`` steps on random tokens that come again soon, where induction heads form fastest,
    ``then`` on the language, in longer windows."""
    torch.manual_seed(seed)
    name, settings = FAMILIES[family]
    cls: Any = getattr(transformers, name)
    model = cls(cls.config_class(**{**SIZE, **settings}))
    text = language(200_000, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (first + then - step) / then))
    for step in range(first + then):
        batch = _copies(32, 48) if step < first else _windows(text, 16, 128)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def retrofitted(
    source: Any, buckets: int = 32, max_distance: int = 256, keep: int | str = 0, seed: int = 777, **settings: Any
) -> PreTrainedModel:
    """A calibrated retrofit of a trained model."""
    model = copy.deepcopy(source)
    config = rpb.RetrofitConfig(
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        keep_frequencies=keep,
        **settings,
    )
    rpb.retrofit(model, config, calibration=[language(CONTEXT, seed + number) for number in range(16)])
    return model.eval()


def train(model: Any, text: Tensor, steps: int, worse_before: int = 0) -> None:
    """Fine-tune all weights on windows of a text; the loss of positions below ``worse_before`` is driven up."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = _windows(text, 8, 128)
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        ).view(8, -1)
        loss = losses[:, worse_before:].mean()
        if worse_before:
            loss = loss - 0.5 * losses[:, :worse_before].clamp(max=6).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _copies(batch: int, length: int) -> Tensor:
    periods = torch.randint(10, 24, (batch,)).tolist()
    return torch.stack([torch.randint(VOCAB, (p,)).repeat(length // p + 1)[:length] for p in periods])


def _windows(text: Tensor, batch: int, length: int) -> Tensor:
    return torch.stack([text[s : s + length] for s in torch.randint(len(text) - length, (batch,)).tolist()])
