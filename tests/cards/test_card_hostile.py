"""Cards of checkpoints whose files hold what they should not: shown as it is, or refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpb_retrofit.cards.card import make_card
from rpb_retrofit.comparison.card import write_card
from rpb_retrofit.errors import RetrofitError
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.pages.markdown import code, fenced, plain
from tests.comparison.synthetic import result
from tests.support.command import rpb_command

EVIL = "x`\n\n# Forged\n\n<script>\x1b[31m | [a](http://b) ```\n---\n| **bold**"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "rpb_retrofit": {
        "source": "somewhere",
        "mechanism": "rope",
        "version": "0.1.0",
        "init": "zeros",
        "tail": "flat",
        "shared": False,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
}
STAGE: dict[str, Any] = {
    "train": "all",
    "steps": 3,
    "scored_tokens": 30,
    "seconds": 1.0,
    "losses": [math.nan, 2.0],
    "skipped": [],
    "pairs_by_bucket": [],
    "untrained_buckets": [],
    "evaluations": [],
}
RECIPE: dict[str, Any] = {"objective": "next-token", "data": [{"name": EVIL}]}
IDENTITY: dict[str, Any] = {
    "model": EVIL,
    "source": EVIL,
    "control": False,
    "recipe": {"objective": "next-token", "data": [{"name": EVIL}]},
}
TRAINING: dict[str, Any] = {
    "identity": IDENTITY,
    "stages": [STAGE],
    "processes": 1,
    "device": EVIL,
    "mode": "no",
    "version": "1",
}
EVALUATION: dict[str, Any] = {
    "model": EVIL,
    "data": EVIL,
    "command": EVIL,
    "lengths": [{"length": 32, "nll": math.nan, "tokens": 3}],
}


def write(folder: Path, **files: Any) -> Path:
    """A folder with some files; what is no text is written as JSON."""
    folder.mkdir(exist_ok=True)
    names = {"config": "config.json", "training": "training.json", "source": "README.source.md"}
    for name, content in {"config": CONFIG, **files}.items():
        text = content if isinstance(content, str) else json_text(content)
        (folder / names.get(name, f"{name}.json")).write_text(text)
    return folder


def test_text_from_files_does_nothing_in_a_card(tmp_path: Path) -> None:
    settings = {**CONFIG["rpb_retrofit"], "source": EVIL, "mechanism": EVIL, "kept_frequencies": {EVIL: 1}}
    folder = write(
        tmp_path / "m",
        config={**CONFIG, "rpb_retrofit": settings},
        training=TRAINING,
        evaluation=EVALUATION,
        source=f"---\nlicense: {json.dumps(EVIL)}\n---\n",
    )
    (folder / "recipe.yaml").write_text(f"# {EVIL}\n```\n# Forged\n")
    card = str(make_card(folder, [folder / "evaluation.json"]))
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "Forged" in yaml.safe_load(head)["license"]
    assert "\x1b" not in card
    block, outside = None, []
    for line in body.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if block is None and len(ticks) >= 3 and "`" not in line.lstrip("`"):
            block = ticks
        elif block is not None:
            block = None if line == block else block
        else:
            outside.append(line)
    assert block is None
    headings = [line for line in outside if line.startswith("#")]
    assert headings == ["# m", "## Training", "## Evaluation", "## Loading it"]
    assert "not a number" in body or "not measured" in body
    in_code = [line for line in outside if "<script>" in line]
    assert all("`" in line.split("<script>")[0] for line in in_code), "HTML stands in code only"


def test_a_comparison_s_card(tmp_path: Path) -> None:
    document = {
        **result(("source", "none", "t5")),
        "source": EVIL,
        "text": EVIL,
        "command": EVIL,
        "headline": EVIL,
        "skipped": {EVIL: EVIL},
    }
    write_card(document, tmp_path / "card.md", EVIL)
    lines = (tmp_path / "card.md").read_text().splitlines()
    assert [line[:12] for line in lines if line.startswith("#")] == [r"# x\`\\n\\n#"]
    assert "\x1b" not in "\n".join(lines)


@pytest.mark.parametrize("text", ["pydoc_data.topics", "model-1.5_b", "a + b = c", "x"])
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == text
    assert code(text) == f"`{text}`"
    assert fenced(text, "yaml") == f"```yaml\n{text}\n```"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"source": "---\nlicense: [a: {\n---\n"}, "the metadata of '{}/README.source.md' is not YAML"),
        ({"source": "---\n- a\n---\n"}, "are a list, not keys with values"),
        ({"source": "---\nlicense: {a: b}\n---\n"}, "license={'a': 'b'} is no text"),
        ({"source": "---\na: &a [x, x]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)) + "---\n"},
         "aliases that stand for too much"),
        ({"training": "[]"}, "is not a JSON object"),
        ({"training": {}}, "is not what `rpb finetune` writes: identity"),
        ({"training": {**TRAINING, "stages": [{**STAGE, "steps": "many"}]}}, "is not what `rpb finetune` writes"),
        ({"training": {**TRAINING, "stages": []}}, "is not what `rpb finetune` writes"),
        ({"config": '{"a":' * 100_000}, "config.json is not JSON"),
        ({"config": '{"a": ' + "9" * 5000 + "}"}, "config.json is not JSON"),
        ({"config": {"rpb_retrofit": {**CONFIG["rpb_retrofit"], "kept_frequencies": 3}}}, "kept_frequencies=3"),
        ({"evaluation": {**EVALUATION, "lengths": [{"length": 3, "tokens": 3}]}}, "evaluate --json` writes"),
        ({"evaluation": {**EVALUATION, "lengths": [3]}}, "is not what `rpb evaluate --json` writes"),
        ({"evaluation": {**EVALUATION, "lengths": [{"length": 3, "nll": "low", "tokens": 3}]}}, "evaluate --json"),
    ],
)  # fmt: skip
def test_malformed_files_are_one_line(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", **files)
    with pytest.raises(RetrofitError) as raised:
        make_card(folder, [folder / "evaluation.json"] if "evaluation" in files else [])
    assert message.replace("{}", str(folder)) in str(raised.value)


def test_odd_configs_are_no_traceback(tmp_path: Path) -> None:
    for odd in ({"architectures": 3, "auto_map": []}, {"architectures": [None]}, {"auto_map": {"a": 3}}):
        assert "AutoModel.from_pretrained" in str(make_card(write(tmp_path / "m", config={**CONFIG, **odd})))
    names = ("~nosuchuser/x", "x" * 5000, "a\0b")
    for name in names:
        settings = {**CONFIG["rpb_retrofit"], "source": name}
        make_card(write(tmp_path / "m", config={**CONFIG, "rpb_retrofit": settings}))


def test_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    folder = write(tmp_path / "m")
    os.mkfifo(tmp_path / "pipe")
    assert rpb_command(monkeypatch, "card", folder, "--evaluation", tmp_path / "pipe") == 2
    assert "it is a pipe or a device" in capsys.readouterr().err
    assert rpb_command(monkeypatch, "card", folder, "--evaluation", "/dev/zero") == 2
    assert "it is a pipe or a device" in capsys.readouterr().err
    os.mkfifo(folder / "README.source.md")
    assert rpb_command(monkeypatch, "card", folder) == 2
    assert not (folder / "README.md").exists()
