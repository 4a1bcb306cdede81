"""Questions about long contexts: each has the answer that a reader finds in it, and models get the score they earn."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import islice, pairwise
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.evaluation.context_use import make_inductions, make_local_orders
from rpb_retrofit.evaluation.filler import pieces
from rpb_retrofit.evaluation.retrieval import Item, cells, make_items, measure, score
from rpb_retrofit.evaluation.tasks import KINDS, PLACED
from rpb_retrofit.evaluation.tasks.key_value import key_value
from rpb_retrofit.text import tokenise
from tests.evaluation.test_evaluation import tokenizer as tokenizer_of_words
from tests.support.training_cases import PROSE, small_tokenizer

LENGTH = 640
"""Room for every kind in a vocabulary of 512."""

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOKENIZERS = ["plain", "bos", "chat", "spaces"]
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
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


@cache
def filler(name: str) -> list[Tensor]:
    """The prose as two documents."""
    return tokenise(tokenizer(name), [PROSE[:20_000], PROSE[20_000:]])


def items(kind: str, name: str, **changes: Any) -> list[Item]:
    asked: dict[str, Any] = {"lengths": [LENGTH], "depths": [0.5], "count": 2, **changes}
    return make_items(kind, tokenizer(name), filler(name), **asked)


def spelled(name: str, ids: Tensor) -> str:
    return tokenizer(name).decode(ids, clean_up_tokenization_spaces=False)


OPENINGS = {
    "passkey": r"The pass key is",
    "multi-key": r"The secret number of the \w+ is",
    "multi-value": r"The secret numbers of the \w+ are",
    "multi-query": r"The secret numbers of .+ are",
    "variable-tracking": r"The variables that have the value \d+ are",
    "common-words": r"The most common words are",
    "key-value": r'"\w+-\d+": "',
}


def split(kind: str, whole: str) -> tuple[str, str]:
    """The reply's opening words, and what lies before the question."""
    text, question = whole.rsplit("\n\n", 1)
    return re.findall(OPENINGS[kind], question)[-1], text


def answer(kind: str, opening: str, text: str) -> str:
    """What a reader who knows the wording finds in a text."""
    if kind == "passkey":
        return _the_only(re.findall(r"The pass key is (\d+)\. Remember", text))
    if kind == "multi-key":
        return _the_only(re.findall(opening + r" (\d+)\.", text))
    if kind == "key-value":
        return _the_only(re.findall(re.escape(opening) + r'(\d+)"', text))
    if kind == "common-words":
        return _spoken([word for word, _ in Counter(text.split("all others.")[1].split()).most_common(3)])
    if kind == "variable-tracking":
        held: dict[str, str] = {}
        for variable, source in re.findall(r"The variable (\w+) = (\w+)\.", text):
            held[variable] = held.get(source, source)
        return _spoken([variable for variable, value in held.items() if value == opening.split()[-2]])
    numbers = re.findall(r"secret number of the (\w+) is (\d+)\.", text)
    return _spoken([value for asked in re.findall(r"the (\w+)", opening) for thing, value in numbers if thing == asked])


def _the_only(found: list[str]) -> str:
    (value,) = found
    return value


def _spoken(things: list[str]) -> str:
    return f"{', '.join(things[:-1])}, and {things[-1]}"


class Stub(torch.nn.Module):
    """What the measurements ask of a model; its logits are `predict` of its token ids (n,)."""

    def __init__(self, vocabulary: int, predict: Callable[[Tensor], Tensor], longest: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=longest)
        self.name_or_path = "stub"
        self.position_table = torch.nn.Parameter(torch.zeros(1))
        self.vocabulary, self.predict, self.passes = vocabulary, predict, 0

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache and not torch.is_grad_enabled()
        self.passes += 1
        logits = self.predict(input_ids[0])
        assert logits.shape == (input_ids.shape[1], self.vocabulary)
        return SimpleNamespace(logits=logits[None])


def uniform(vocabulary: int) -> Any:
    return Stub(vocabulary, lambda ids: torch.zeros(len(ids), vocabulary))


SURE = 30.0


def reader(kind: str, name: str, wrong_at: int | None = None) -> Any:
    """Reads the text, works the answer out and writes it; with ``wrong_at``, that token of it is another."""
    words = tokenizer(name)

    def predict(ids: Tensor) -> Tensor:
        opening, prompt = split(kind, spelled(name, ids))
        logits = torch.zeros(len(ids), len(words))
        written = _written(name, opening, kind, answer(kind, opening, prompt))
        if wrong_at is not None:
            written[wrong_at] = (written[wrong_at] + 1) % len(words)
        logits[torch.arange(len(ids) - 1 - len(written), len(ids) - 1), written] = SURE
        return logits

    return Stub(len(words), predict)


def _written(name: str, opening: str, kind: str, found: str) -> list[int]:
    """The token ids of an answer that follows its opening words: all that reach beyond these."""
    text = opening + ("" if kind == "key-value" else " ") + found
    encoded = tokenizer(name)(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > len(opening)]


@every_kind
@every_tokenizer
def test_the_prompt_has_the_answer(kind: str, name: str) -> None:
    for item in items(kind, name, depths=[0, 0.3, 1], lengths=[LENGTH, LENGTH + 101]):
        assert item.ids.dtype == torch.long and len(item.ids) == item.length
        prompt, rest = spelled(name, item.ids[: item.answer]), spelled(name, item.ids[item.answer :])
        opening, text = split(kind, prompt + rest)
        found = answer(kind, opening, text)
        assert rest.strip(' "') == found
        assert item.ids[item.answer :].tolist() == _written(name, opening, kind, found), "as in running text"


@every_tokenizer
def test_lines_are_whole(name: str) -> None:
    (item,) = items("key-value", name, count=1)
    assert spelled(name, item.ids).count('"\n"') > 10, "as in running text, with no space at the beginning of a piece"


def test_no_key_comes_twice() -> None:
    lines = list(islice(key_value(Random(0), 0.5).padding or (), 12_000))
    assert len({line.split(":")[0] for line in lines}) == 12_000


def test_chains_are_followed() -> None:
    (item,) = items("variable-tracking", "plain", count=1)
    links = re.findall(r"The variable (\w+) = (\w+)\.", spelled("plain", item.ids))
    assert sum(source.isdecimal() for _, source in links) == 2
    assert len(links) == 8


@every_kind
def test_filler_is_text_as_it_is(kind: str) -> None:
    text = torch.arange(1000, 3000)
    made = make_items(kind, tokenizer("plain"), [text], [LENGTH], [0.5], 4)
    found = [item.ids[item.ids >= 1000] for item in made]
    if kind in ("key-value", "common-words"):
        assert not any(map(len, found)), "these fill the context themselves"
        return
    assert all(torch.equal(ids, torch.arange(ids[0], ids[-1] + 1)) for ids in found)
    assert min(b - a for a, b in pairwise(sorted(int(ids[0]) for ids in found))) > 100, "far apart"


@every_tokenizer
def test_prompts_fit_the_model(name: str) -> None:
    words = tokenizer(name)
    (item,) = items("passkey", name, count=1)
    text = spelled(name, item.ids)
    begin = "A pass key, a number of five digits, is hidden"
    if name == "chat":
        assert text.startswith(f"<s>user\n{begin}")
        assert re.search(r"hidden in the text above\?</s>\n<s>assistant\nThe pass key is \d{5}$", text)
    else:
        assert text.removeprefix("<s> ").removeprefix("<s>").lstrip().startswith(begin)
        assert re.search(r"hidden in the text above\?\nThe pass key is \d{5}$", text)
    assert item.ids.tolist().count(words.bos_token_id) == {"plain": 0, "bos": 1, "chat": 2, "spaces": 0}[name]
    assert (item.ids[0] == words.bos_token_id) == (name in ("bos", "chat"))


@settings(max_examples=25)
@given(kind=st.sampled_from([kind for kind in PLACED if kind != "key-value"]), depth=st.floats(0, 1))
def test_depth(kind: str, depth: float) -> None:
    words = tokenizer("plain")
    (blank,) = words("~", add_special_tokens=False)["input_ids"]
    (item,) = make_items(kind, words, [torch.full((1000,), blank)], [LENGTH], [depth], 1)
    ids, wanted = item.ids[: item.answer], item.ids[item.answer :]
    found = [i for i in range(len(ids) - len(wanted)) if torch.equal(ids[i : i + len(wanted)], wanted)]
    before, all_of_it = (ids[: found[0]] == blank).sum().item(), (ids == blank).sum().item()
    assert all_of_it > 100
    assert before == round(depth * all_of_it)


@settings(max_examples=25)
@given(depth=st.floats(0, 1))
def test_depth_among_pairs(depth: float) -> None:
    text = spelled("plain", make_items("key-value", tokenizer("plain"), [], [LENGTH], [depth], 1)[0].ids)
    *pairs, (asked, value) = re.findall(r'"(\w+-\d+)": "(\d+)', text)
    assert len(pairs) > 12 and len({key for key, _ in pairs}) == len(pairs)
    # The last of the padding may be cut short, and then counts as a pair only for its place.
    assert abs(pairs.index((asked, value)) - depth * (len(pairs) - 1)) <= 1


@every_kind
def test_an_item_is_the_same_whatever_else_is_asked_for(kind: str) -> None:
    many = items(kind, "plain", lengths=[LENGTH, 700], depths=[0, 0.25, 1], count=3)
    texts = {tuple(item.ids.tolist()) for item in many}
    assert len(texts) == len(many) == (18 if kind in PLACED else 6)
    for item in many:
        alone = items(kind, "plain", lengths=[item.length], depths=[item.depth or 0], count=item.number + 1)[-1]
        assert (alone.number, alone.depth, alone.answer) == (item.number, item.depth, item.answer)
        assert torch.equal(alone.ids, item.ids)
        other = items(kind, "plain", lengths=[item.length], depths=[item.depth or 0], count=item.number + 1, seed=1)[-1]
        assert not torch.equal(other.ids[other.answer :], item.ids[item.answer :])


@every_kind
@pytest.mark.parametrize("name", ["plain", "chat"])
def test_scores(kind: str, name: str) -> None:
    for item in items(kind, name, depths=[0, 1]):
        right = score(reader(kind, name), item)
        assert right.correct and right.nll < 1e-6
        size = len(item.ids) - item.answer
        for wrong_at in (0, size - 1):
            wrong = score(reader(kind, name, wrong_at), item)
            assert not wrong.correct
            assert wrong.nll == pytest.approx(SURE / size, rel=1e-3), "one token of the answer is lost"
        vocabulary = len(tokenizer(name))
        blind = score(uniform(vocabulary), item)
        assert not blind.correct and blind.nll == pytest.approx(math.log(vocabulary), rel=1e-5)


VOCABULARY = 400
COUNTING = [torch.arange(VOCABULARY), torch.arange(VOCABULARY // 2)]


def copier(ids: Tensor) -> Tensor:
    """After a token that came before, what followed it the first time; else anything."""
    logits = torch.zeros(len(ids), VOCABULARY)
    for i, token in enumerate(ids.tolist()):
        if (first := ids.tolist().index(token)) < i:
            logits[i, ids[first + 1]] = SURE
    return logits


@pytest.mark.parametrize("bos", [None, 399])
def test_induction(bos: int | None) -> None:
    made = make_inductions(COUNTING, [8, 40, 150], count=3, span=8, bos=bos)
    start = bos is not None
    for item in made:
        twice = item.ids[start : start + 8]
        assert torch.equal(item.ids[start + item.distance :], twice) and len(twice.unique()) == 8
        assert len(item.ids) == start + item.distance + 8
        between = item.ids[start + 8 : -8]
        assert not len(between) or torch.equal(between, torch.arange(between[0], between[-1] + 1)), "text, as it is"
    assert len({tuple(item.ids.tolist()) for item in made}) == 9
    (alone,) = make_inductions(COUNTING, [40], count=1, span=8, bos=bos)
    assert torch.equal(alone.ids, made[3].ids)
    for row in measure(Stub(VOCABULARY, copier), made, progress=False):
        assert row["without"] == pytest.approx(math.log(VOCABULARY), rel=1e-5), "new tokens cannot be copied"
        assert row["given"] < 1e-6
        assert row["gain"] == row["without"] - row["given"]
    rare = torch.arange(VOCABULARY) / 100
    for blind in (uniform(VOCABULARY), Stub(VOCABULARY, lambda ids: rare.expand(len(ids), VOCABULARY))):
        rows = measure(blind, made, progress=False)
        assert all(row["gain"] == pytest.approx(0, abs=1e-6) for row in rows), "the same tokens are compared"


def counter(ids: Tensor) -> Tensor:
    """Goes on counting where it has seen nothing but counting."""
    logits = torch.zeros(len(ids), VOCABULARY)
    steps = ids[1 : 2 * len(ids) // 3].diff() == 1
    if steps.all():
        logits[torch.arange(len(ids)), (ids + 1) % VOCABULARY] = SURE
    return logits


def frequencies(ids: Tensor) -> Tensor:
    """Knows how often it has seen each token, and not in which order."""
    return torch.nn.functional.one_hot(ids, VOCABULARY).cumsum(0).log1p()


@pytest.mark.parametrize("bos", [None, 399])
def test_local_order(bos: int | None) -> None:
    made = make_local_orders(COUNTING, [30, 90], count=4, bos=bos)
    (alone,) = make_local_orders(COUNTING, [90], count=1, bos=bos)
    assert torch.equal(alone.swapped, made[4].swapped)
    start, moved = int(bos is not None), 0
    for item in made:
        n = len(item.ids)
        assert item.scored == n // 3 and torch.equal(item.ids[-item.scored :], item.swapped[-item.scored :])
        shift = item.swapped - item.ids
        assert not shift[:start].any()
        i = start
        while i < n:  # where one token moved up, its neighbour moved down
            assert shift[i] in (0, 1)
            if shift[i] == 1:
                assert shift[i + 1] == -1
                moved += 2
                i += 1
            i += 1
    assert 0.5 < moved / sum(len(item.ids) - item.scored for item in made) < 0.8
    for row in measure(Stub(VOCABULARY, counter), made, progress=False):
        assert row["gain"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
        assert row["gain"] == row["without"] - row["given"]
    for blind in (uniform(VOCABULARY), Stub(VOCABULARY, frequencies)):
        assert all(row["gain"] == pytest.approx(0, abs=1e-6) for row in measure(blind, made, progress=False))


@given(
    sizes=st.lists(st.integers(0, 12), max_size=5),
    size=st.integers(0, 8),
    number=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_pieces(sizes: list[int], size: int, number: int, seed: int) -> None:
    documents = [torch.arange(100 * i, 100 * i + n) for i, n in enumerate(sizes)]
    if sum(max(0, n - size + 1) for n in sizes) < number:
        wanted = f"take a document of {size + number - 1} tokens, the longest has {max(sizes, default=0)}"
        with pytest.raises(DataError, match=wanted):
            pieces(documents, size, number, Random(seed))
        return
    found = pieces(documents, size, number, Random(seed))
    for piece in found:
        assert len(piece) == size
        assert not size or any(torch.equal(piece, d[piece[0] % 100 :][:size]) for d in documents), "of one document"
    if size:
        assert len({int(piece[0]) for piece in found}) == number
    for piece, again in zip(found, pieces(documents, size, max(1, number // 2), Random(seed)), strict=False):
        assert torch.equal(piece, again)


def test_rows_can_be_journalled() -> None:
    made: list[Any] = [
        *make_inductions(filler("plain"), [64], 1),
        *items("passkey", "plain", depths=[0, 1]),
        *make_local_orders(filler("plain"), [60], 1),
        *items("multi-query", "plain"),
    ]
    rows = measure(uniform(len(tokenizer("plain"))), made, progress=False)
    assert json.loads(json.dumps(rows)) == rows
    kinds = ["induction", *["passkey"] * 4, "local-order", "multi-query", "multi-query"]
    assert [row["kind"] for row in rows] == kinds
    assert (rows[0]["distance"], rows[5]["length"]) == (64, 60)
    found = cells(rows)
    assert [(c.kind, c.length, c.depth, c.items) for c in found] == [
        ("passkey", LENGTH, 0, 2),
        ("passkey", LENGTH, 1, 2),
        ("multi-query", LENGTH, None, 2),
    ]
    earned = [{**rows[1], "correct": True, "nll": 1.0}, {**rows[2], "correct": False, "nll": 4.0}]
    assert [(c.correct, c.nll) for c in cells(earned)] == [(0.5, 2.5)]


def test_a_table_that_ends_too_soon() -> None:
    model: Any = Stub(VOCABULARY, copier, longest=100)
    made = make_local_orders(COUNTING, [60, 120], count=1)
    with pytest.raises(DataError, match="length 120: 'stub' has a table of 100 positions"):
        measure(model, made, progress=False)
    assert model.passes == 0
    assert len(measure(model, made[:1], progress=False)) == 1


def test_wrong_requests() -> None:
    for wrong, error, text in (
        (lambda: items("needle", "plain"), ConfigError, "'needle': no such kind, choose from passkey, multi-key, key"),
        (lambda: items("passkey", "plain", depths=[0, 1.5]), ConfigError, "depth 1.5: it must lie between 0"),
        (lambda: items("passkey", "plain", lengths=[100]), DataError, r"length 100: .* passkey takes 1\d\d tokens"),
        (
            lambda: make_items("passkey", tokenizer("plain"), [torch.zeros(600)], [LENGTH], [0], 3),
            DataError,
            f"take a document of {LENGTH + 2} tokens, the longest has 600",
        ),
        (lambda: make_items("passkey", tokenizer_of_words(), [], [LENGTH], [0], 1), DataError, "cannot spell '"),
        (lambda: make_inductions(COUNTING, [16], 1), ConfigError, "distance 16, span 32"),
        (lambda: make_inductions([torch.arange(7)], [8], 1, span=8), DataError, "7 different tokens.*takes 8"),
        (lambda: make_local_orders(COUNTING, [5], 1), ConfigError, "length 5: local order takes 6"),
        (lambda: make_local_orders(COUNTING, [500], 1), DataError, "a document of 500 tokens, the longest has 400"),
    ):
        with pytest.raises(error, match=text):
            wrong()
