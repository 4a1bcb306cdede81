"""Inputs that nobody thought of, for a fixed time: RPB_FUZZ_SECONDS sets more, RPB_FUZZ_SEED repeats a run.

Every target draws its own inputs and asserts the property of `tests.fuzz.property`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import rpb_retrofit as rpb
from rpb_retrofit.training.recipe import Recipe
from tests.fuzz import inputs
from tests.fuzz.property import judge, run, strict
from tests.support.command import RPB
from tests.support.training_cases import PROSE, write_retrofit, write_source

SECONDS = float(os.environ.get("RPB_FUZZ_SECONDS", "45"))
SEED = int(os.environ.get("RPB_FUZZ_SEED", secrets.randbelow(2**32)))
AT_ONCE = 5
"""Examples between two looks at the clock."""

ASKED = ("--lengths", "32", "--tokens", "64", "--json", "out.json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source and its retrofit."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_retrofit(write_source(folder / "source"), folder / "retrofit")
    (folder / "text.txt").write_text(PROSE[:1000])
    return folder


class Place:
    """A folder for one example: the models, and files that are put over theirs."""

    def __init__(self, models: Path) -> None:
        self._held = tempfile.TemporaryDirectory(prefix="fuzz-", dir=models)
        self.folder = Path(self._held.name)
        for name in ("source", "retrofit"):
            shutil.copytree(models / name, self.folder / name, copy_function=os.link)
        os.link(models / "text.txt", self.folder / "text.txt")

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.cleanup()

    def put(self, name: str, content: bytes) -> None:
        """Replace a file, which is linked to the models' own."""
        file = self.folder / name
        file.unlink(missing_ok=True)
        file.write_bytes(content)


def evaluated(place: Place, model: str, data: str = "text.txt") -> None:
    """Evaluate; where that is done, the loss is a number, or said to be none."""
    if run(place.folder, ["evaluate", model, "--data", data, *ASKED], ["out.json"]) == 0:
        told = strict(place.folder / "out.json")
        (length,) = told["lengths"]
        assert length["nll"] is not None or "lengths.0.nll" in told["not_finite"]


def retrofitted(place: Place, *options: str) -> None:
    """Retrofit; where that is done, what came out loads and runs."""
    if run(place.folder, ["retrofit", "source", "OUT", *options], ["OUT"]) == 0:
        with torch.no_grad():
            logits = rpb.load(place.folder / "OUT")(torch.arange(8)[None]).logits
        assert logits.shape[:2] == (1, 8) and logits.isfinite().all()


def config_of_a_retrofit(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    def check(place: Place, content: bytes) -> None:
        place.put("retrofit/config.json", content)
        evaluated(place, "retrofit")

    return inputs.json_file(json.loads((models / "retrofit/config.json").read_text())), check


def config_of_a_source(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    def check(place: Place, content: bytes) -> None:
        place.put("source/config.json", content)
        retrofitted(place, "--init", "zeros")

    return inputs.json_file(json.loads((models / "source/config.json").read_text())), check


def shard_of_a_source(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    def check(place: Place, content: bytes) -> None:
        place.put("source/model.safetensors", content)
        retrofitted(place, "--init", "zeros")

    return inputs.safetensors_file((models / "source/model.safetensors").read_bytes()), check


def shard_of_a_retrofit(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    shard = min((models / "retrofit").glob("*.safetensors"), key=lambda file: file.stat().st_size)

    def check(place: Place, content: bytes) -> None:
        place.put(f"retrofit/{shard.name}", content)
        evaluated(place, "retrofit")

    return inputs.safetensors_file(shard.read_bytes()), check


def settings_of_a_retrofit(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    def check(place: Place, options: list[str]) -> None:
        retrofitted(place, "--init=zeros", *options)

    return inputs.settings().filter(lambda drawn: "--init=calibrated" not in drawn), check


def recipes(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    def check(place: Place, content: bytes) -> None:
        place.put("recipe.yaml", content)
        run(place.folder, ["finetune", "retrofit", "OUT", "--recipe", "recipe.yaml", "--show-recipe"])

    return inputs.recipe_file(Recipe().model_dump()), check


def texts(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    def check(place: Place, drawn: tuple[str, bytes]) -> None:
        suffix, content = drawn
        place.put(f"data{suffix}", content)
        evaluated(place, "retrofit", f"data{suffix}")

    return inputs.text_file(PROSE[:800]), check


def cards(models: Path) -> tuple[st.SearchStrategy[Any], Callable[[Place, Any], None]]:
    names = ("retrofit/config.json", "retrofit/README.source.md", "evaluation.json", "retrofit/training.json")
    length = {"length": 32, "nll": 3.0, "tokens": 31}
    evaluation = {"model": "retrofit", "data": "text.txt", "command": "rpb", "lengths": [length]}
    whole = {"retrofit/config.json": json.loads((models / "retrofit/config.json").read_text())}

    def check(place: Place, drawn: tuple[str, bytes]) -> None:
        place.put("evaluation.json", json.dumps(evaluation).encode())
        place.put(*drawn)
        run(place.folder, ["card", "retrofit", "--evaluation", "evaluation.json"], ["retrofit/README.md"])

    files = st.sampled_from(names).flatmap(
        lambda name: st.tuples(
            st.just(name),
            inputs.recipe_file({"license": "mit"}).map(lambda yaml: b"---\n" + yaml + b"\n---\n")
            if name.endswith(".md")
            else inputs.json_file(whole.get(name, evaluation)),
        )
    )
    return files, check


TARGETS = (
    config_of_a_retrofit,
    config_of_a_source,
    shard_of_a_source,
    shard_of_a_retrofit,
    settings_of_a_retrofit,
    recipes,
    texts,
    cards,
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bars."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_done_or_refused_in_one_line(target: Callable[[Path], Any], models: Path) -> None:
    strategy, check = target(models)
    end, number = time.monotonic() + SECONDS / len(TARGETS), SEED
    while time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=AT_ONCE,
            deadline=None,
            derandomize=False,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            print_blob=False,
        )
        @given(strategy)
        def example(drawn: Any) -> None:
            with Place(models) as place:
                check(place, drawn)

        try:
            example()
        except BaseException as error:
            error.add_note(f"RPB_FUZZ_SEED={number}")
            raise
        number += 1


HOSTILE: dict[str, bytes] = {
    "retrofit/config.json": b'{"a":' * 100_000,
    "recipe.yaml": b"seed: 1\nseed: 2\n",
}


@pytest.mark.process
@pytest.mark.parametrize("name", HOSTILE)
def test_the_same_in_a_process_of_its_own(name: str, models: Path) -> None:
    commands = {
        "retrofit/config.json": ["evaluate", "retrofit", "--data", "text.txt"],
        "recipe.yaml": ["finetune", "retrofit", "OUT", "--recipe", "recipe.yaml", "--show-recipe"],
    }
    with Place(models) as place:
        place.put(name, HOSTILE[name])
        done = subprocess.run(
            [*RPB, *commands[name]], cwd=place.folder, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 2
    judge(done.returncode, done.stdout, done.stderr)
