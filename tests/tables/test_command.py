"""`rpb retrofit` where it reads text: the same as in memory, shards untouched, and wrong input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import rpb_retrofit as rpb
from rpb_retrofit.errors import DataError
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.windows import spread_windows
from tests.families.cases import BY_NAME
from tests.support.command import rpb_command
from tests.support.tiny_models import VOCAB, build
from tests.support.tokenizers import WORDS, tokenizer_of_words

LLAMA = BY_NAME["llama"]
SMALL = ("--buckets", 8, "--max-distance", 16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    build(LLAMA).save_pretrained(folder)
    tokenizer_of_words().save_pretrained(folder)
    return folder


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    generator = torch.Generator().manual_seed(0)
    file.write_text(" ".join(WORDS[i] for i in torch.randint(VOCAB, (1800,), generator=generator)))
    return file


@pytest.mark.parametrize("link", [True, False])
def test_a_calibrated_checkpoint(link: bool, source: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, answer = source.parent / "out", source.parent / "said.json"
    cut = ("--calibration", prose, "--calibration-length", 64, "--calibration-tokens", 256)
    options = (*SMALL, *cut, "--polish", 3, "--keep-frequencies", 1, "--json", answer, *(["--link"] if link else []))
    shard = (source / "model.safetensors").read_bytes()
    assert rpb_command(monkeypatch, "retrofit", source, out, *options) == 0
    assert (
        (source / "model.safetensors").read_bytes() == (out / "model-00001-of-00002.safetensors").read_bytes() == shard
    )
    text = CalibrationText.of(str(prose), tokens=256, length=64)
    model, words = build(LLAMA), AutoTokenizer.from_pretrained(source)
    settings = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    config = rpb.RetrofitConfig(**settings, polish=3, keep_frequencies=1)
    report = rpb.retrofit(model, config, text.windows(words, 2048), text.polishing(words, 2048, 3))
    written = rpb.load(out)
    for name in report.tables:
        assert torch.equal(written.get_parameter(name), model.get_parameter(name))
        assert written.get_parameter(name).abs().max() > 0
    told = json.loads(answer.read_text())
    assert told["calibration_text"] == "prose.txt"
    assert told["calibration"]["layers"][0]["after"] == report.calibration.layers[0].after
    assert told["polish"]["steps"] == 3
    assert written.config.rpb_retrofit["kept_frequencies"] == {"inv_freq": 1}


def test_buckets_factors_and_a_tail(
    source: Path, prose: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was chosen and folded is said, and is what the checkpoint has."""
    out = source.parent / "out"
    cut = ("--calibration", prose, "--calibration-length", 64, "--calibration-tokens", 256)
    options = ("--buckets", "auto", "--calibrate", "tables+content", "--tail", "log", *cut)
    assert rpb_command(monkeypatch, "retrofit", source, out, *options) == 0
    printed, written = capsys.readouterr().out, rpb.load(out)
    settings = written.config.rpb_retrofit
    count, reach = settings["relative_attention_num_buckets"], settings["relative_attention_max_distance"]
    assert (
        f"buckets auto: {count} to {reach}" in printed
        and "factors on the content term folded into 2 weights" in printed
    )
    bias = written.model.layers[0].self_attn.relative_attention_bias
    assert bias.weight.shape == (4, count) and bias.tail.shape == (4, 1)
    again = source.parent / "again"
    reuse = ("--init", f"from:{out}", "--tail", "log", "--buckets", count, "--max-distance", reach)
    assert rpb_command(monkeypatch, "retrofit", source, again, *reuse, *cut) == 0
    assert "heads matched on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (("--calibration", "nowhere.txt"), "--calibration 'nowhere.txt': no such file"),
        (("--calibration-length", "4096"), "--calibration-length 4096: the source was made for 2048 tokens at most"),
        (("--calibration", "PROSE"), "prose.txt: its longest document has 1800 tokens, too few for a window of 2048"),
        (("--calibration-repeats", "0.7"), "--calibration-repeats 0.7: give a share from 0 to 0.5"),
        (("--init", "alibi", "--polish", "3", "--calibration-repeats", "0.5"), "--calibration-repeats"),
        (("--init", "zeros", "--calibration", "PROSE"), "--init zeros uses no text; leave one of the two out"),
        (("--calibrate", "content"), "calibrate='content': choose tables or tables+content"),
        (("--calibrate", "tables+content", "--init", "zeros"), "calibrate='tables+content' needs init='calibrated'"),
        (("--tail", "long"), "tail='long': choose flat or log"),
        (("--buckets", "auto", "--init", "alibi"), "relative_attention_num_buckets='auto' needs init='calibrated'"),
        (
            ("--keep-frequencies", "many"),
            "keep_frequencies=many: 'many' is neither a number from 0 on, 'auto' nor 'all'",
        ),
        (("--keep-frequencies", "-1"), "keep_frequencies=-1: '-1' is neither a number from 0 on, 'auto' nor 'all'"),
        (("--keep-frequencies", "2,banana"), "keep_frequencies=2,banana: 'banana' is no rule: write LAYERS:K"),
        (("--keep-frequencies", "2,:3"), "keep_frequencies=2,:3: ':3' is no rule: write LAYERS:K"),
        (("--keep-frequencies", "2,a b:3"), "keep_frequencies=2,a b:3: 'a b' names no layers"),
        (("--keep-frequencies", "2,1-0:3"), "keep_frequencies=2,1-0:3: '1-0' is no range"),
        (("--keep-frequencies", "2,7:3"), "keep_frequencies: '7' is for no layer: "),
        (("--keep-frequencies", "2,0-7:3"), "keep_frequencies: '0-7' is for no layer: "),
        (("--keep-frequencies", "2,sliding_attention:3"), "keep_frequencies: 'sliding_attention' is for no layer: "),
        (("--init", "from:nowhere/at/all"), "'nowhere/at/all': no such folder"),
        (("--polish", "2", "--init", "zeros", "--calibration", "TOKENIZER"), "has no tokenizer"),
    ],
)
def test_wrong_input(
    options: tuple[str, ...],
    answer: str,
    source: Path,
    prose: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "TOKENIZER" in options:
        for file in source.glob("tokenizer*"):
            file.unlink()
    given = [str(prose) if option in ("PROSE", "TOKENIZER") else option for option in options]
    assert rpb_command(monkeypatch, "retrofit", source, source.parent / "out", *SMALL, *given) == 2
    error = capsys.readouterr().err
    assert answer in " ".join(error.replace("│", " ").split())
    assert not (source.parent / "out").exists()


def test_windows_are_spread_and_keep_their_special_tokens() -> None:
    words = tokenizer_of_words()
    text = Text("two", [" ".join(WORDS[5:30]), " ".join(WORDS[30:55])])
    inside = torch.tensor(words(text.documents)["input_ids"])
    windows = torch.stack(spread_windows(words, text, length=8, tokens=32))
    assert windows.shape == (4, 8)
    stretches = {tuple(stretch.tolist()) for document in inside for stretch in document.unfold(0, 8, 1)}
    assert {tuple(window.tolist()) for window in windows} < stretches, "each is one stretch of one document"
    assert len(windows.unique(dim=0)) == 4
    assert bool((windows < 30).any() and (windows > 40).any()), "from the whole text"
    with pytest.raises(DataError, match="two: its longest document has 25 tokens, too few for a window of 40"):
        spread_windows(words, text, length=40, tokens=80)
    words._tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    around = torch.stack(spread_windows(words, text, length=8, tokens=32))
    assert around.shape == (4, 8) and (around[:, 0] == 1).all() and (around[:, -1] == 2).all()
