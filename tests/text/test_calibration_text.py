"""The windows that tables are calibrated on."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.swap import inplace
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.repeats import with_repeats
from rpb_retrofit.text.tokens import special_ids
from rpb_retrofit.text.windows import spread_windows
from tests.families.cases import BY_NAME
from tests.support.command import rpb_command
from tests.support.tiny_models import build
from tests.support.tokenizers import WORDS, tokenizer_of_words

PROSE = Text("words", [" ".join(WORDS[i] for i in torch.arange(900) % len(WORDS))])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_repeats_in_longer_and_shorter_windows(share: float) -> None:
    tokenizer = tokenizer_of_words()
    windows = CalibrationText(PROSE, 1024, 128, share).windows(tokenizer, 2048)
    assert Counter(map(len, windows)) == {128: 4, 32: 16}
    plain = [*spread_windows(tokenizer, PROSE, 128, 512), *spread_windows(tokenizer, PROSE, 32, 512)]
    wanted = with_repeats(plain, share, special=special_ids(tokenizer))
    assert all(map(torch.equal, windows, wanted))
    assert all(map(torch.equal, windows, plain)) == (share == 0)


@pytest.mark.parametrize("share", [-0.1, 0.51, 1.0, math.nan, math.inf])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ConfigError, match=f"--calibration-repeats {share:g}: give a share from 0 to 0.5"):
        CalibrationText(PROSE, repeats=share)


def test_tokens_that_are_only_marked_as_special() -> None:
    """Chat templates' marks have no role that a tokenizer knows; to plant them anywhere would say something."""
    tokenizer = tokenizer_of_words(bos=True)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("word")])
    marked, word = tokenizer.convert_tokens_to_ids(["<|turn|>", "word"])
    assert {marked, tokenizer.bos_token_id} <= set(special_ids(tokenizer))
    assert word not in special_ids(tokenizer)


@pytest.mark.parametrize("options", [(), ("--calibration-repeats", 0.4)], ids=["by default", "asked for"])
def test_the_command_calibrates_on_them(
    options: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(inplace, "check_windows", lambda model, windows: seen.extend(windows) or list(windows))
    build(BY_NAME["llama"]).save_pretrained(tmp_path / "source")
    tokenizer = tokenizer_of_words()
    tokenizer.save_pretrained(tmp_path / "source")
    prose, told = tmp_path / "prose.txt", tmp_path / "told.json"
    prose.write_text(PROSE.documents[0])
    cut = ("--calibration", prose, "--calibration-length", 64, "--calibration-tokens", 256, "--json", told)
    assert rpb_command(monkeypatch, "retrofit", tmp_path / "source", tmp_path / "out", *cut, *options) == 0
    wanted_share = 0.4 if options else 0.0
    wanted = CalibrationText(PROSE, 256, 64, wanted_share).windows(tokenizer, 2048)
    assert json.loads(told.read_text())["calibration_repeats"] == wanted_share
    assert len(seen) == len(wanted) and all(map(torch.equal, seen, wanted))
