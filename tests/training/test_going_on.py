"""A run goes on, after kills, signals and full disks and from what is damaged, to the weights of an undisturbed one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rpb_retrofit.errors import CheckpointError, ConfigError, InterruptedRunError, TrainingError
from rpb_retrofit.training.checkpoints import Checkpoints
from rpb_retrofit.training.stage import StageRun
from tests.support.training_cases import assert_equal_runs, poison, run, run_alone, run_arms, watch_steps


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_ten_times(whole: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.training_cases"])
    kills = 0
    while kills < 10:
        process = context.Process(target=run_alone, args=(retrofit, out, text, {"save_every": 2}, 0.15))
        process.start()
        # Moments all over the run: while it opens, trains, saves a checkpoint, ends a stage.
        process.join(draw.uniform(0.2, 1.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            break
        assert not out.exists()
    if not out.exists():
        run_alone_in(context, retrofit, out, text, {"save_every": 2})
    assert_equal_runs(out, whole)
    assert kills == 10, "the moments are too late for this machine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def run_alone_in(context: Any, *args: Any) -> None:
    process = context.Process(target=run_alone, args=args)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def test_sigterm_saves_and_goes_on(
    whole: Path, retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    third = 13  # of the second stage, which saves after every fifth
    steps = watch_steps(monkeypatch, lambda number: number == third and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError, match="SIGTERM after step 3 of 30 of stage 2"):
        run(retrofit, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    run(retrofit, tmp_path / "out", text)
    assert len(steps) == 40, "nothing is trained twice"
    assert_equal_runs(tmp_path / "out", whole)


def test_a_full_disk_leaves_the_last_checkpoint(
    whole: Path, retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    published = Checkpoints.publish

    def publish(self: Checkpoints, step: int, meta: Any) -> None:
        if step == 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        published(self, step, meta)

    monkeypatch.setattr(Checkpoints, "publish", publish)
    with pytest.raises(TrainingError, match=r"step 15 .*No space left on device.*step-00000010, is whole"):
        run(retrofit, tmp_path / "out", text)
    kept = sorted(path.name for path in (tmp_path / "out.run" / "stage-2.checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000010"]
    monkeypatch.undo()
    run(retrofit, tmp_path / "out", text)
    assert_equal_runs(tmp_path / "out", whole)


def test_both_arms_go_on(retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watch_steps(monkeypatch, lambda number: number == 3 and os.kill(os.getpid(), signal.SIGTERM))
    changes = {"stages": [{"tokens": 256, "lengths": {64: 1}}]}
    with pytest.raises(InterruptedRunError, match="after step 1 of 2"):
        run_arms(retrofit, tmp_path / "out", text, changes)
    both = run_arms(retrofit, tmp_path / "out", text, changes)
    assert len(steps) == 4 and list(both) == ["retrofit", "control"]
    assert [len(summary.stages[0].losses) for summary in both.values()] == [2, 2]
    (tmp_path / "out-control" / "training.json").unlink()
    with pytest.raises(CheckpointError, match="out-control' exists already"):
        run_arms(retrofit, tmp_path / "out", text, changes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_stage_ends(
    number: int, whole: Path, retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    measure, times = StageRun._evaluate, 0

    def evaluate(self: StageRun) -> Any:
        nonlocal times
        times += 1
        if times == 2:  # after the first stage's last step
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as launchers pass it on
        return measure(self)

    monkeypatch.setattr(StageRun, "_evaluate", evaluate)
    with pytest.raises(InterruptedRunError, match="after step 10 of 10 of stage 1"):
        run(retrofit, tmp_path / "out", text)
    run(retrofit, tmp_path / "out", text)
    assert_equal_runs(tmp_path / "out", whole)


def test_stages_do_not_depend_on_the_process(
    retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage draws its low-rank updates; a process that begins with it draws the same."""
    changes = {"stages": [{"train": "lora", "tokens": 256, "lengths": {64: 1}, "lora_rank": 2}] * 2}
    run(retrofit, tmp_path / "whole", text, changes)
    train, stages = StageRun.run, 0

    def only_one(self: StageRun) -> None:
        nonlocal stages
        stages += 1
        if stages == 2:
            raise KeyboardInterrupt
        train(self)

    monkeypatch.setattr(StageRun, "run", only_one)
    with pytest.raises(KeyboardInterrupt):
        run(retrofit, tmp_path / "out", text, changes)
    run(retrofit, tmp_path / "out", text, changes)
    assert_equal_runs(tmp_path / "out", tmp_path / "whole")


@pytest.fixture(scope="module")
def stopped(whole: Path, retrofit: Path, text: Path) -> Path:
    """The folder of a run that was stopped after step 13 of its second stage, with checkpoints of steps 5 and 10."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, at=24)
        with pytest.raises(TrainingError):
            run(retrofit, retrofit.parent / "stopped", text)
    return retrofit.parent / "stopped.run"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def nonsense(file: Path) -> None:
    file.write_text("[]")


NEWEST = "stage-2.checkpoints/step-00000010"
DAMAGE: list[tuple[Callable[[Path], None], str, int, str]] = [
    (cut, f"{NEWEST}/model.safetensors", 25, "model.safetensors' was cut short or changed: this checkpoint is left"),
    (flip, f"{NEWEST}/model.safetensors", 25, "model.safetensors' was cut short or changed: this checkpoint is left"),
    (cut, f"{NEWEST}/optimizer.safetensors", 25, "optimizer.safetensors' was cut short or changed"),
    (Path.unlink, f"{NEWEST}/random-0.safetensors", 25, "random-0.safetensors' cannot be read"),
    (cut, f"{NEWEST}/rpb.json", 25, "rpb.json' is not JSON"),
    (nonsense, f"{NEWEST}/rpb.json", 25, "rpb.json' is not a JSON object"),
    (cut, "stage-2.checkpoints/*/model.safetensors", 30, "step-00000005/model.safetensors' was cut"),
    (cut, "run.json", 20, "run.json' is not JSON: .*what the checkpoints say of the run is taken"),
    (nonsense, "run.json", 20, "run.json' is not a JSON object: what the checkpoints say"),
    (Path.unlink, "run.json", 20, "run.json' cannot be read: No such file or directory: what the checkpoints say"),
    (cut, "stage-1/model.safetensors", 40, "stage 1 is trained again, and what came after it: .*was cut short"),
    (cut, "stage-1/state.json", 40, "stage 1 is trained again, and what came after it: .*state.json' is not JSON"),
]
"""What is done to which files; how many of the forty steps are then left; and what is said."""


@pytest.mark.parametrize(
    ("damage", "files", "left", "message"),
    DAMAGE,
    ids=lambda value: getattr(value, "__name__", str(value).split("/")[-1]),
)
def test_going_on_from_what_is_damaged(
    damage: Callable[[Path], None],
    files: str,
    left: int,
    message: str,
    stopped: Path,
    whole: Path,
    retrofit: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the newest thing that is whole, saying so, to the same weights."""
    torch.set_num_threads(1)
    shutil.copytree(stopped, tmp_path / "out.run")
    for file in [*(tmp_path / "out.run").glob(files)]:
        damage(file)
    steps, lines = watch_steps(monkeypatch), list[str]()
    run(retrofit, tmp_path / "out", text, say=lines.append)
    assert len(steps) == left and any(re.search(message, line) for line in lines), lines
    assert all("\n" not in line for line in lines)
    assert_equal_runs(tmp_path / "out", whole)


def test_nothing_says_whose_run_it_is(stopped: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    """A damaged run.json, and checkpoints of a run with other settings: neither mixed in, nor thrown away."""
    shutil.copytree(stopped, tmp_path / "out.run")
    cut(tmp_path / "out.run" / "run.json")
    with pytest.raises(ConfigError, match=r"run.json' is not JSON.* and nothing else says .*--restart throws it away"):
        run(retrofit, tmp_path / "out", text, {"seed": 1})
    assert (tmp_path / "out.run" / NEWEST).is_dir()


def test_checkpoints_hold_no_pickle(
    stopped: Path, retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none is read: with every way to unpickle gone, a run goes on all the same."""
    kinds = {file.suffix for file in stopped.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".py", ""}, "(a retrofit's own code travels with it)"

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was unpickled")

    shutil.copytree(stopped, tmp_path / "out.run")
    for name in ("optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"):
        (tmp_path / "out.run" / NEWEST / name).write_bytes(b"\x80\x04.")
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    run(retrofit, tmp_path / "out", text)


def test_a_checkpoint_without_its_last_file_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "step-00000007").mkdir()
    assert checkpoints.last() is None
    for step in (1, 2, 3):
        checkpoints.partial(step).mkdir()
        checkpoints.publish(step, {"step": step})
    saved = checkpoints.last()
    assert saved is not None and saved.meta["step"] == 3
    assert sorted(path.name for path in tmp_path.glob("step*")) == ["step-00000002", "step-00000003", "step-00000007"]
