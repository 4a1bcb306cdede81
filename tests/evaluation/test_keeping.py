"""What `rpb retrofit` says of what a retrofit keeps: the same figures as measured by hand, on text held out."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation import keeping
from rpb_retrofit.evaluation.context_use import induction_gains
from rpb_retrofit.evaluation.keeping import Keeping, Measures, measures
from rpb_retrofit.evaluation.nll import Windows, nll_at_length
from rpb_retrofit.text import calibration_text
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.tokens import tokenise
from tests.families.cases import BY_NAME
from tests.support.command import rpb_command
from tests.support.tiny_models import VOCAB, build
from tests.support.tokenizers import WORDS, tokenizer_of_words

LLAMA = BY_NAME["llama"]
SMALL = ("--buckets", 8, "--max-distance", 16, "--calibration-length", 64, "--calibration-tokens", 256)


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(VOCAB, (count,), generator=generator))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    build(LLAMA).save_pretrained(folder)
    tokenizer_of_words().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, spans and texts of these models' size."""
    monkeypatch.setattr(keeping, "LENGTHS", (64, 128, 4096))
    monkeypatch.setattr(keeping, "TOKENS", 256)
    monkeypatch.setattr(keeping, "SPANS", {64: 2, 4000: 1})
    monkeypatch.setattr(calibration_text, "ENOUGH", 4000)


@pytest.mark.parametrize(("count", "seen"), [(4000, False), (900, True)], ids=["held out", "a short text"])
def test_the_command_measures_what_is_kept(
    count: int, seen: bool, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prose, out, answer = source.parent / "prose.txt", source.parent / "out", source.parent / "said.json"
    prose.write_text(words(count))
    assert rpb_command(monkeypatch, "retrofit", source, out, "--calibration", prose, *SMALL, "--json", answer) == 0
    calibration = CalibrationText(Text("prose.txt", [prose.read_text()]), 256, 64)
    fitted, held_out = calibration.parted()
    assert (held_out is fitted.text) == seen
    (ids,) = documents = tokenise(tokenizer_of_words(), held_out.documents)
    assert seen or (len(ids) < count / 7 and prose.read_text().endswith(held_out.documents[0]))
    retrofit, plain = rpb.load(out), AutoModelForCausalLM.from_pretrained(source)
    expected = {
        name: {
            "losses": {str(n): nll_at_length(model, documents, Windows(n, n, None), 256).nll for n in (64, 128)},
            "gains": {"64": fmean(induction_gains(model, documents, {64: 2})[64])},
        }
        for name, model in (("source", plain), ("retrofit", retrofit))
    }
    told = json.loads(answer.read_text())["measured"]
    assert told["seen"] == seen and told["text"] == "prose.txt"
    for name, wanted in expected.items():
        for kind in ("losses", "gains"):
            assert told[name][kind] == pytest.approx(wanted[kind], rel=1e-5, abs=1e-6)
    printed = capsys.readouterr().out
    before, after = (expected[name]["losses"]["128"] for name in ("source", "retrofit"))
    assert f"{before:.3f} -> {after:.3f} ({after - before:+.3f}) at 128 tokens" in printed
    assert ("which it was calibrated on" in printed) == seen
    tables = {name: value for name, value in retrofit.state_dict().items() if "relative_attention_bias" in name}
    by_hand = rpb.retrofit(
        plain,
        rpb.RetrofitConfig(relative_attention_num_buckets=8, relative_attention_max_distance=16),
        fitted.windows(tokenizer_of_words(), 2048),
    )
    assert by_hand.tables and all(torch.equal(plain.state_dict()[name], value) for name, value in tables.items())


def test_measuring_may_be_left_out(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose, out, answer = source.parent / "prose.txt", source.parent / "out", source.parent / "said.json"
    prose.write_text(words(4000))
    options = ("--calibration", prose, *SMALL, "--no-measure", "--json", answer)
    assert rpb_command(monkeypatch, "retrofit", source, out, *options) == 0
    assert "measured" not in json.loads(answer.read_text())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_has_no_next_tokens_is_not_measured(name: str) -> None:
    with pytest.raises(DataError, match="does not predict next tokens"):
        measures(Text("words", [words(900)]), build(BY_NAME[name]), tokenizer_of_words())


def test_a_context_shorter_than_all_lengths() -> None:
    """The longest window that fits is measured then, and no span that does not."""
    model = build(LLAMA, max_position_embeddings=48)
    found = measures(Text("words", [words(900)]), model, tokenizer_of_words())
    assert list(found.losses) == [48] and found.gains == {}
    with pytest.raises(DataError, match="hold no window of 32 tokens"):
        measures(Text("words", [words(31)]), model, tokenizer_of_words())


def test_in_words() -> None:
    source, retrofit = Measures({512: 3.0}, {128: 10.0, 512: -0.5}), Measures({512: 3.25}, {128: 9.0, 512: 0.0})
    assert str(Keeping("a text", False, source, retrofit)).splitlines() == [
        "measured on a text, which nothing was fitted to; source -> retrofit:",
        "loss in nats a token: 3.000 -> 3.250 (+0.250) at 512 tokens",
        "what a span that comes again gains, in nats a token: "
        "10.0 -> 9.0 (90%) at 128 tokens; -0.5 -> 0.0 at 512 tokens",
    ]


@given(st.lists(st.text("ab ", min_size=1), max_size=5), st.integers(0, 60))
def test_a_text_in_two_parts(documents: list[str], characters: int) -> None:
    """Nothing is lost but blanks, no word is cut unless it is longer than the part, and the first is no longer than
    asked for."""
    first, rest = Text("x", documents).parted(characters)
    kept = ["".join(first.documents + rest.documents).replace(" ", ""), "".join(documents).replace(" ", "")]
    assert kept[0] == kept[1] and first.characters <= characters
    if first.documents and rest.documents and first.documents[-1] + rest.documents[0] in documents:
        assert first.documents[-1].endswith(" ") or rest.documents[0].startswith(" ") or " " not in first.documents[-1]
