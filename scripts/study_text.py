"""The text of scripts/study.py: Python's standard library in a small alphabet, with planted lines that come twice."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from string import ascii_lowercase
from typing import Any


def sources() -> Iterator[str]:
    """The modules of the standard library, in the order of their names, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if not {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__"} & {*parts}:
            text = file.read_text(encoding="utf-8", errors="replace")
            if len(text) > 4000:
                yield text


ALPHABET = "abcdefghijklmnopqrstuvwxyz 0_.,:=()#'\n"
"""All characters of the text, and tokens of the models: with fewer of them so small a model learns sooner to copy."""

AS = {**dict.fromkeys("0123456789", "0"), **dict.fromkeys("([{", "("), **dict.fromkeys(")]}", ")"), '"': "'"}
"""What stands for characters that are not in it; all others are full stops."""


def spelled(text: str) -> str:
    """The text in the alphabet."""
    return "".join(letter if letter in ALPHABET else AS.get(letter, ".") for letter in text.lower())


def planted(text: str, rng: random.Random) -> str:
    """The text with lines of random letters in it, each of which comes a second time 26 to 2,000 characters later."""
    due: list[tuple[float, str]] = []
    lines, at = list[str](), 0

    def put(line: str) -> None:
        nonlocal at
        lines.append(line)
        at += len(line) + 1

    for line in text.splitlines():
        put(line)
        while due and due[0][0] <= at:
            put(heappop(due)[1])
        if rng.random() < 0.35:
            secret = "# " + "".join(rng.choices(ascii_lowercase, k=24))
            heappush(due, (at + 26 * (2000 / 26) ** rng.random(), secret))
            put(secret)
    return "\n".join(lines)


def copies(rng: random.Random) -> str:
    """A short string of random characters, again and again, to 64 in all."""
    return ("".join(rng.choices(ALPHABET, k=rng.randint(8, 21))) * 8)[:64]


def prepare_text(folder: Path, copies_tokens: int) -> None:
    """Text to score, to choose rates by and to train on, different modules each; so many tokens of strings to copy; a
    tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    documents = [planted(spelled(text), rng) for text in sources()]
    rng.shuffle(documents)
    eighth = len(documents) // 8
    parts = {
        "scored": documents[:eighth],
        "held_out": documents[eighth : 2 * eighth],
        "train": documents[2 * eighth :],
        "copies": [copies(rng) for _ in range(copies_tokens // 64)],
    }
    for name, texts in parts.items():
        rows = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(ALPHABET)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tokenizer")


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of single letters."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")
