"""Questions about long contexts: each has the answer that a reader finds in it, and models get the score they earn."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import islice, pairwise
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpb_retrofit.evaluation.retrieval import make_items, score
from rpb_retrofit.evaluation.tasks import KINDS, PLACED
from rpb_retrofit.evaluation.tasks.key_value import key_value
from tests.evaluation.retrieval_cases import LENGTH, SURE, Stub, items, spelled, uniform
from tests.support.tokenizers import TEXT_TOKENIZERS, tokenizer_of_text

every_tokenizer = pytest.mark.parametrize("name", TEXT_TOKENIZERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


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


def _the_only(values: list[str]) -> str:
    (value,) = values
    return value


def _spoken(things: list[str]) -> str:
    return f"{', '.join(things[:-1])}, and {things[-1]}"


def reader(kind: str, name: str, wrong_at: int | None = None) -> Any:
    """Reads the text, works the answer out and writes it; with ``wrong_at``, that token of it is another."""
    words = tokenizer_of_text(name)

    def predict(ids: Tensor) -> Tensor:
        opening, prompt = split(kind, spelled(name, ids))
        logits = torch.zeros(len(ids), len(words))
        written = _written(name, opening, kind, answer(kind, opening, prompt))
        if wrong_at is not None:
            written[wrong_at] = (written[wrong_at] + 1) % len(words)
        logits[torch.arange(len(ids) - 1 - len(written), len(ids) - 1), written] = SURE
        return logits

    return Stub(len(words), predict)


def _written(name: str, opening: str, kind: str, given: str) -> list[int]:
    """The token ids of an answer that follows its opening words: all that reach beyond these."""
    text = opening + ("" if kind == "key-value" else " ") + given
    encoded = tokenizer_of_text(name)(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end > len(opening)]


@every_kind
@every_tokenizer
def test_the_prompt_has_the_answer(kind: str, name: str) -> None:
    for item in items(kind, name, depths=[0, 0.3, 1], lengths=[LENGTH, LENGTH + 101]):
        assert item.ids.dtype == torch.long and len(item.ids) == item.length
        prompt, rest = spelled(name, item.ids[: item.answer]), spelled(name, item.ids[item.answer :])
        opening, text = split(kind, prompt + rest)
        given = answer(kind, opening, text)
        assert rest.strip(' "') == given
        assert item.ids[item.answer :].tolist() == _written(name, opening, kind, given), "as in running text"


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
    made = make_items(kind, tokenizer_of_text("plain"), [text], [LENGTH], [0.5], 4)
    spans = [item.ids[item.ids >= 1000] for item in made]
    if kind in ("key-value", "common-words"):
        assert not any(map(len, spans)), "these fill the context themselves"
        return
    assert all(torch.equal(ids, torch.arange(ids[0], ids[-1] + 1)) for ids in spans)
    assert min(b - a for a, b in pairwise(sorted(int(ids[0]) for ids in spans))) > 100, "far apart"


@every_tokenizer
def test_prompts_fit_the_model(name: str) -> None:
    words = tokenizer_of_text(name)
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
    words = tokenizer_of_text("plain")
    (blank,) = words("~", add_special_tokens=False)["input_ids"]
    (item,) = make_items(kind, words, [torch.full((1000,), blank)], [LENGTH], [depth], 1)
    ids, wanted = item.ids[: item.answer], item.ids[item.answer :]
    starts = [i for i in range(len(ids) - len(wanted)) if torch.equal(ids[i : i + len(wanted)], wanted)]
    before, all_of_it = (ids[: starts[0]] == blank).sum().item(), (ids == blank).sum().item()
    assert all_of_it > 100
    assert before == round(depth * all_of_it)


@settings(max_examples=25)
@given(depth=st.floats(0, 1))
def test_depth_among_pairs(depth: float) -> None:
    text = spelled("plain", make_items("key-value", tokenizer_of_text("plain"), [], [LENGTH], [depth], 1)[0].ids)
    *pairs, (asked, value) = re.findall(r'"(\w+-\d+)": "(\d+)', text)
    assert len(pairs) > 12 and len({key for key, _ in pairs}) == len(pairs)
    # The last of the padding may be cut so short that it is no pair any more: it still counts for the place.
    others = len(pairs) - 1
    assert pairs.index((asked, value)) in {min(round(depth * count), others) for count in (others, others + 1)}


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
        vocabulary = len(tokenizer_of_text(name))
        blind = score(uniform(vocabulary), item)
        assert not blind.correct and blind.nll == pytest.approx(math.log(vocabulary), rel=1e-5)
