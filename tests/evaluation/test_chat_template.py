"""Chat templates of checkpoints: rendered as Transformers renders them, and stopped where they would not end."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation import chat
from rpb_retrofit.evaluation.chat import render
from tests.support.command import rpb_command
from tests.support.training_cases import PROSE, small_tokenizer, write_source

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HOSTILE = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 4 seconds"),
    "memory": ("{% set ns = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
               "takes more than 512 MB"),
    "constant": ("{{ 'a' * 3000000000 }}", "takes more than 512 MB"),
    "length": ("{{ 'a' * 3000000 }}", "3,000,000 characters"),
    "raises": ("{{ raise_exception('only\x1b[31m tools\nrpb: done') }}", r"only\x1b[31m tools"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "undefined": ("{{ messages[7].content.nothing }}", "UndefinedError"),
    "deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be used"),
    "number": ("{{ 10 ** 10000 }}", "cannot be used"),
    "deaf": ("Hello", "writes a user's message 0 times"),
    "twice": ("{{ messages[0].content }}{{ messages[0].content }}", "writes a user's message 2 times"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_source(folder / "model")
    (folder / "text.txt").write_text(PROSE[:6000])
    return folder


def test_as_transformers_renders_it() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHATML
    for message in ("plain", "two\nlines", "ünïcödé \ue000 'quoted' {{ 1 + 1 }}"):
        turn = [{"role": "user", "content": message}]
        expected = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert render(tokenizer, message) == expected and "</s>" in expected


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template, expected = HOSTILE[name]
    (folder / "model" / "chat_template.jinja").write_text(template)
    asked = ["--retrieval", "passkey", "--items", "1", "--depths", "0", "--lengths", "200", "--tokens", "400"]
    start = time.monotonic()
    assert rpb_command(monkeypatch, "evaluate", folder / "model", "--data", folder / "text.txt", *asked) == 2
    took = time.monotonic() - start
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rpb: ")]
    assert "the chat template of" in line and expected in line and "\x1b" not in line
    assert took < 30, "10 s on a quiet machine, of which the models' loading is some"


def test_after_a_hostile_one_a_good_one_is_rendered() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = HOSTILE["constant"][0]
    with pytest.raises(DataError, match="512 MB"):
        render(tokenizer, "a")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    assert render(tokenizer, "a").startswith("<|user|>")
    running = chat._process._running
    assert running is not None
    (limit,) = re.findall(r"Max address space +(\d+)", Path(f"/proc/{running.pid}/limits").read_text())
    assert int(limit) < 2**30, "the process and all that a template may take"
    tokenizer.chat_template = {"some": "x", "other": "y"}
    with pytest.raises(DataError, match="multiple chat templates with no default"):
        render(tokenizer, "a")
    tokenizer.chat_template = json.loads("3")
    with pytest.raises(DataError, match="cannot be used"):
        render(tokenizer, "a")
