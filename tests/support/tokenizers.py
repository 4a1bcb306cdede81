"""Tokenizers of the tests: of whole words, and of text."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.training_cases import PROSE, small_tokenizer

WORDS = [f"w{i}" for i in range(61)]
"""As many as the small models of tests/families know tokens."""


def tokenizer_of_words(bos: bool = False) -> PreTrainedTokenizerFast:
    """A token for each of `WORDS`; with ``bos`` it has a BOS token, which it does not add by itself."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", **({"bos_token": "w1"} if bos else {}))


CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TEXT_TOKENIZERS = ("plain", "bos", "chat", "spaces")
"""The names of `tokenizer_of_text`."""


@cache
def tokenizer_of_text(name: str) -> PreTrainedTokenizerFast:
    """Byte-level: plain, with a BOS that it adds, or with a chat template that writes it too; or like SentencePiece's:
    a space before every word, the first of a text too."""
    if name == "spaces":
        return _tokenizer_of_spaces()
    made = small_tokenizer()
    if name != "plain":
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
    if name == "chat":
        made.chat_template = CHAT
    return made


def _tokenizer_of_spaces() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = [chr(code) for code in (10, *range(33, 127))]
    inner.train_from_iterator(
        [PROSE], trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
