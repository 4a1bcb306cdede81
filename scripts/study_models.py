"""The models of scripts/study.py: their size, a base, and how it is trained from scratch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_text import ALPHABET, tokenizer_of

if TYPE_CHECKING:
    from rpb_retrofit.training.recipe import Recipe


@dataclass(frozen=True)
class Size:
    """The model, and the tokens of training: on ``copies``, on ``text``, and to heal. ``context`` is the base's; the
    longest text is 16 times that."""

    hidden: int
    layers: int
    heads: int
    context: int
    copies_tokens: int
    text_tokens: int
    heal_tokens: int
    batch_tokens: int
    base_rate: float
    rates: tuple[float, ...]
    scored_tokens: int
    precision: str = "no"

    @property
    def lengths(self) -> tuple[int, ...]:
        """1 to 16 times the context."""
        return tuple(self.context * 2**power for power in range(5))


SIZES = {
    "cpu": Size(192, 2, 6, 128, 1_000_000, 1_500_000, 250_000, 2048, 2e-3, (5e-4, 2e-3), 65_536),
    "gpu": Size(512, 10, 8, 512, 50_000_000, 500_000_000, 30_000_000, 65_536, 1e-3, (1e-4, 3e-4), 262_144, "bf16"),
}


def parameters(size: Size) -> int:
    """Of a base."""
    return sum(parameter.numel() for parameter in new_model(size, 0).parameters())


def new_model(size: Size, seed: int) -> Any:
    """A Llama with RoPE, drawn by a seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=size.hidden,
        intermediate_size=round(size.hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.context,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def recipe_of(size: Size, folder: Path, tokens: int, rate: float, seed: int, copying: bool = False) -> Recipe:
    """Next tokens at the context of the base, a fifth of them strings to copy, or nothing else: that is learned
    suddenly, so there the rate stays high."""
    from rpb_retrofit.training.recipe import Data, Recipe, Stage

    decay = "constant" if copying else "cosine"
    copies, text = Data(name=str(folder / "copies.jsonl")), Data(name=str(folder / "train.jsonl"), weight=4)
    return Recipe(
        stages=[Stage(tokens=tokens, rate=rate, lengths={size.context: 1.0}, decay=decay)],
        data=[copies] if copying else [text, copies],
        held_out=str(folder / "held_out.jsonl"),
        objective="next-token",
        batch_tokens=size.batch_tokens,
        weight_decay=0.01,
        precision=size.precision,
        seed=seed,
        save_every=10**9,
        evaluate_every=10**9,
        trackers=[],
    )


def train_base(folder: Path, size: Size, seed: int) -> None:
    """The base of a seed, saved."""
    from rpb_retrofit.files.folder import whole_folder

    if (place := folder / f"base-{seed}").exists():
        return
    model, _ = trained(new_model(size, seed), folder, size, size.text_tokens, seed, f"base {seed}")
    with whole_folder(place) as whole:
        model.save_pretrained(whole)
        tokenizer_of(folder).save_pretrained(whole)


def trained(model: Any, folder: Path, size: Size, tokens: int, seed: int, label: str) -> tuple[Any, float]:
    """The model after it has learned to copy, and then on so many tokens of text; and the seconds."""
    from rpb_retrofit.comparison.healing import heal

    seconds = 0.0
    for copying, budget in ((True, size.copies_tokens), (False, tokens)):
        recipe = recipe_of(size, folder, budget, size.base_rate, seed, copying)
        model, healed = heal(model, tokenizer_of(folder), recipe, label, say)
        seconds += healed.seconds
        say(f"{label}, {'copying' if copying else 'text'}: {healed}")
    return model, seconds


def say(line: str) -> None:
    """A line on the progress."""
    print(line, file=sys.stderr, flush=True)
