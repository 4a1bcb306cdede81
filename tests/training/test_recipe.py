"""Recipes are read strictly: a wrong or hostile one is refused in one line that names the key and its value."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.training.recipe import Recipe, read_recipe
from tests.support.command import rpb_command


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("batch_token: 3", "unknown key 'batch_token': did you mean 'batch_tokens'?"),
        ("stages: [{tokens: 8, rates: 1}]", "unknown key 'stages.0.rates': did you mean 'rate'?"),
        (
            "stages: [{train: heads, tokens: 8}]",
            "stages.0.train='heads': input should be 'tables', 'lora', 'attention' or 'all'",
        ),
        ("stages: []", "stages=[]: list should have at least 1 item"),
        ("stages: [{tokens: -1}]", "stages.0.tokens=-1: input should be greater than 0"),
        ("stages: [{tokens: 9, rate: .inf}]", "stages.0.rate=inf: input should be a finite number"),
        (
            "stages: [{tokens: 9, lengths: {1: 1}}]",
            "stages.0.lengths.1=1: input should be greater than or equal to 2",
        ),
        ("batch_tokens: 256", "batch_tokens=256 holds no sequence of 512 tokens: raise it"),
        ("data: [{name: a, weight: 0}]", "data.0.weight=0: input should be greater than 0"),
        ("{relations: 1, objective: next-token}", "relations=1.0 needs objective=distillation, not next-token"),
        ("{relations: 1, compile: true}", "relations=1.0 and compile=True: attention is not handed out of a graph"),
        (
            "{stages: [{train: attention, tokens: 512}], objective: next-token}",
            "train=attention needs objective=distillation, not next-token",
        ),
        ("{stages: [{train: attention, tokens: 512}], compile: true}", "train=attention and compile=True"),
        ("seed: one", "seed='one': input should be a valid integer"),
        ("[1, 2]", "holds a list, not keys with values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe(settings: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(settings)
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_changes_on_the_command_line(tmp_path: Path) -> None:
    recipe = read_recipe(None, {"stages.1.tokens": 10_000, "data": [{"name": "a.txt"}], "data.0.weight": 2})
    assert recipe.stages[1].tokens == 10_000 and recipe.stages[0] == Recipe().stages[0]
    assert recipe.data[0].weight == 2
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "resolved.yaml") == recipe
    for key in ("stages.7.tokens", "stages.x.tokens", "seed.0"):
        with pytest.raises(ConfigError, match=f"there is no '{key}'"):
            read_recipe(None, {key: 1})


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["--show-recipe", "--set", "seed=7", "--json", tmp_path / "j.json"]
    assert rpb_command(monkeypatch, "finetune", "R", "OUT", *shown) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert json.loads((tmp_path / "j.json").read_text())["seed"] == 7
    for arguments, message in [
        (["--set", "seed"], "--set seed: give KEY=VALUE"),
        (["--control", "--arms", "retrofit"], "--control and --arms retrofit: give one of the two"),
        (["--arms", "teacher"], "arm 'teacher': choose retrofit, control, or retrofit,control"),
        (["--recipe", str(tmp_path / "none.yaml")], "cannot be read: No such file"),
        ([], "'./R': no such folder"),
    ]:
        assert rpb_command(monkeypatch, "finetune", "./R", tmp_path / "OUT", *arguments) == 2, arguments
        assert message in capsys.readouterr().err


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' twice"),
        ("stages:\n- {tokens: 10, rate: 1.0, rate: 2.0}\n", "the key 'rate' twice"),
        (BOMB, "aliases that stand for too much"),
        (f"seed: &z [*z]\n{BOMB}", "aliases that stand for too much"),
        ("[" * 5000, "nested too deep"),
        ("seed: " + "9" * 5000, "a number"),
        ("seed: 1" + " " * 300_000, "more than 262,144 bytes"),
        ("? [a, b]\n: 1\n", "a key that is no plain value"),
        ("seed: 2024-99-99\n", "is not YAML"),
        ("seed: !!python/object/apply:os.system [id]\n", "is not YAML"),
        ("seed: &x 3\nkeep: *x\nstages: [{tokens: 0}]\n", "stages.0.tokens=0"),
        ("stages: [{tokens: 10, lengths: {64: 1}, rate: '" + "y" * 10_000 + "'}]\n", "stages.0.rate='yyyy"),
    ],
    ids=lambda value: value[:20],
)
def test_recipes_are_read_strictly(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        read_recipe(file)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700 and time.monotonic() - start < 10


def test_counts_in_a_recipe() -> None:
    assert read_recipe(None, {"stages.1.tokens": "5M", "batch_tokens": "4k"}).stages[1].tokens == 5_000_000
