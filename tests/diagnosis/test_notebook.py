"""`rpb_retrofit.diagnose` as a notebook calls it: models in memory or on disk, text in memory, results as objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import rpb_retrofit as rpb
from rpb_retrofit.errors import CheckpointError, ConfigError, DataError
from rpb_retrofit.files.strict_json import json_text
from tests.support.training_cases import PROSE

PLAN: dict[str, Any] = {"lengths": [32, 96], "tokens": 768, "probed": 192, "items": 1, "rounds": 0}
TEXT = [PROSE[:8000]]


def source_of(checkpoints: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints / "source").eval()


def tokenizer_of(checkpoints: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints / "source")


def evidence(diagnosis: rpb.Diagnosis) -> list[tuple[str, str]]:
    return [(cause.name, cause.finding.because) for cause in diagnosis.causes]


@pytest.mark.parametrize(("name", "first"), [("retrofit", None), ("dropped", "tables_not_loaded")])
def test_models_in_memory_are_told_what_saved_ones_are(
    name: str, first: str | None, checkpoints: Path, tmp_path: Path
) -> None:
    saved = rpb.diagnose(checkpoints / name, data=checkpoints / "text.txt", **PLAN)
    out = tmp_path / "out"
    loaded = rpb.diagnose(
        rpb.load(checkpoints / name).eval(),
        source_of(checkpoints),
        tokenizer=tokenizer_of(checkpoints),
        data=TEXT,
        out=out,
        **PLAN,
    )
    assert evidence(loaded) == evidence(saved)
    assert [cause.name for cause in loaded.causes][:1] == ([] if first is None else [first])
    assert loaded.summary and loaded.figures["loss"] == saved.figures["loss"]
    assert not loaded.failed
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json_text({"command": report["command"], **loaded.to_dict()}))
    assert report["command"].startswith("rpb_retrofit.diagnose(retrofit=") and report["command"].endswith("[...])")
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no journal of what cannot be told from another"


def test_the_running_model_is_diagnosed_not_its_weights(checkpoints: Path) -> None:
    """What was set in this process is seen; nothing is written, and nothing opened but the source that it names."""
    model, messages = rpb.load(checkpoints / "retrofit").eval(), list[str]()
    model.config._attn_implementation = "sdpa"
    diagnosis = rpb.diagnose(
        model, tokenizer=tokenizer_of(checkpoints), data=TEXT, only=["bias_dropped"], say=messages.append, **PLAN
    )
    assert [cause.name for cause in diagnosis.causes] == ["bias_dropped"] and not diagnosis.figures
    assert set(diagnosis.arms) == {"retrofit", "source"} and len(messages) == 1


def test_a_model_in_memory_needs_its_tokenizer(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the retrofit is a model in memory: give its tokenizer, too, as"):
        rpb.diagnose(rpb.load(checkpoints / "retrofit"), data=TEXT, **PLAN)
    with pytest.raises(ConfigError, match=r"^tokenizer: '.*retrofit' is read with its own"):
        rpb.diagnose(checkpoints / "retrofit", tokenizer=tokenizer_of(checkpoints), data=TEXT, **PLAN)


def test_wrong_input_is_told_before_anything_is_opened(tmp_path: Path) -> None:
    for error, match, given in (
        (ConfigError, "--only nonsense: no such hypothesis; choose from", {"only": ["nonsense"]}),
        (ConfigError, "--items -1: at least 0", {"items": -1}),
        (ConfigError, "--tokens 1: at least 2", {"tokens": 1}),
        (ConfigError, "--lengths 1: ", {"lengths": [1]}),
        (ConfigError, "--bos maybe", {"bos": "maybe"}),
        (ConfigError, "--only draws no report", {"only": ["precision"], "out": tmp_path / "out"}),
        (CheckpointError, "exists already", {"out": tmp_path}),
        (DataError, "holds no text", {"data": [" "]}),
    ):
        with pytest.raises(error, match=match):
            rpb.diagnose(tmp_path / "missing", **{**PLAN, **given})
