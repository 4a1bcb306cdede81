"""Fine-tuning: that a run survives, that processes agree, that it says what went wrong, and what it trains."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.open_models import trained_pairs
from rpb_retrofit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InterruptedRunError,
    NotRetrofittedError,
    TrainingError,
)
from rpb_retrofit.training import step as step_module
from rpb_retrofit.training.checkpoints import Checkpoints
from rpb_retrofit.training.recipe import Recipe
from rpb_retrofit.training.stage import StageRun
from rpb_retrofit.training.step import Stepper
from rpb_retrofit.training.summary import read_summary
from tests.support.training_cases import (
    PROSE,
    RECIPE,
    run,
    run_alone,
    run_arms,
    write_encoder,
    write_retrofit,
    write_source,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def retrofit(source: Path) -> Path:
    return write_retrofit(source, source.parent / "retrofit")


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    file = source.parent / "text.txt"
    file.write_text(PROSE)
    return file


@pytest.fixture(scope="module")
def whole(retrofit: Path, text: Path) -> Path:
    """A run that nothing disturbed, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(retrofit, retrofit.parent / "whole", text)
    torch.set_num_threads(threads)
    return retrofit.parent / "whole"


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def losses(folder: Path) -> list[float]:
    return [loss for stage in json.loads((folder / "training.json").read_text())["stages"] for loss in stage["losses"]]


def assert_equal_runs(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses(one) == losses(other)


# --- what a run makes ----------------------------------------------------------------------------------------------


def test_a_run_ends_in_a_retrofit(whole: Path, retrofit: Path) -> None:
    summary = json.loads((whole / "training.json").read_text())
    first, second = summary["stages"]
    assert [len(first["losses"]), len(second["losses"])] == [10, 30]
    assert second["losses"][-1] < first["losses"][0] - 0.3
    for stage in (first, second):
        # Offset 0 has one pair a token, and in 64 tokens no pair is 100 apart.
        assert stage["pairs_by_bucket"][0] == 128 * len(stage["losses"]) and stage["pairs_by_bucket"][20] > 0
        assert stage["pairs_by_bucket"][-1] == 0 and stage["untrained_buckets"][-1] == 31
    model, before = rpb.load(whole), rpb.load(retrofit)
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert changed == dict(before.named_parameters()).keys()
    assert (whole / "recipe.yaml").exists() and (whole / "training.png").stat().st_size > 10_000
    assert not whole.with_name("whole.run").exists()


def test_a_stage_of_tables_trains_nothing_else(retrofit: Path, text: Path, tmp_path: Path) -> None:
    run(retrofit, tmp_path / "out", text, {"stages": [{"train": "tables", "tokens": 640, "lengths": {64: 1}}]})
    before, after = weights(retrofit), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "relative_attention_bias" in name}


def test_lora_is_merged(retrofit: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"train": "lora", "tokens": 1280, "lengths": {64: 1}, "lora_rank": 4, "rate": 1e-3}]
    run(retrofit, tmp_path / "out", text, {"stages": stages})
    before, after = weights(retrofit), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "relative_attention_bias" in name or "_proj." in name}
    name = "model.layers.0.mlp.up_proj.weight"
    rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-6)
    assert rank == 4


def test_distillation_from_the_source(source: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"train": "all", "tokens": 5120, "lengths": {64: 1}, "rate": 1e-3}]
    said: list[str] = []
    changes = {"objective": "distillation", "stages": [{"train": "tables", "tokens": 128, "lengths": {64: 1}}, *stages]}
    summary = run(retrofit, tmp_path / "out", text, changes, say=said.append)
    kl = [loss for stage in summary.stages for loss in stage.losses]
    assert fmean(kl[-8:]) < 0.9 * fmean(kl[:8])  # one batch alone is easier or harder than another
    size = sum(p.numel() for p in rpb.load(retrofit).parameters()) * 4 / 1e6
    spared = next(float(line.split()[5]) for line in said if "shares" in line)
    assert spared == pytest.approx(size, abs=1), "while tables are trained the source costs no second copy"
    control = run(retrofit, tmp_path / "control", text, changes, control=True)
    assert max(loss for stage in control.stages for loss in stage.losses) < 1e-6
    own = weights(tmp_path / "control")
    assert all(torch.equal(own[name], tensor) for name, tensor in weights(source).items()), "it had nothing to learn"


def test_the_control_sees_the_same_tokens(
    source: Path, retrofit: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    summary = run(retrofit, tmp_path / "control", text, control=True)
    retrofitted = json.loads((whole / "training.json").read_text())
    assert [s.scored_tokens for s in summary.stages] == [s["scored_tokens"] for s in retrofitted["stages"]]
    model = rpb_less(tmp_path / "control")
    assert type(model).__name__ == "LlamaForCausalLM"
    before = weights(source)
    changed = {name for name, tensor in weights(tmp_path / "control").items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys()


def rpb_less(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_relations(checkpointing: bool, source: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    """Tables that learn from a teacher with other tables find them, up to the constant that softmax ignores."""
    from_zeros = write_retrofit(source, tmp_path / "zeros", init="zeros")
    stages = [{"train": "tables", "tokens": 12_800, "lengths": {64: 1}, "table_rate": 0.1}]
    changes = {
        "objective": "distillation",
        "relations": 100.0,
        "stages": stages,
        "gradient_checkpointing": checkpointing,
    }
    (stage,) = run(from_zeros, tmp_path / "out", text, {**changes, "spike": None}, source=str(retrofit)).stages
    assert stage.losses[-1] < 0.02 * stage.losses[0]
    found, wanted = weights(tmp_path / "out"), weights(retrofit)
    for name in (name for name in wanted if "relative_attention_bias" in name):
        near, far = found[name][:, :24], wanted[name][:, :24]  # buckets with many pairs in 64 tokens
        difference = near - near.mean(1, keepdim=True) - far + far.mean(1, keepdim=True)
        assert difference.square().mean() < 0.05 * far.var()
    control = run(retrofit, tmp_path / "control", text, changes, source=str(retrofit), control=True)
    assert max(control.stages[0].losses) < 1e-6


@pytest.mark.parametrize("objective", ["masked", "distillation of predictions", "distillation of states"])
def test_encoders(objective: str, text: Path, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "source", head=not objective.endswith("states"))
    retrofit = write_retrofit(source, tmp_path / "retrofit")
    stages = [{"train": "all", "tokens": 25_600, "lengths": {64: 1}, "rate": 2e-3}]
    changes = {"objective": objective.split()[0], "stages": stages, "batch_tokens": 512, "trackers": ["tensorboard"]}
    (stage,) = run(retrofit, tmp_path / "out", text, changes).stages
    start, end = (sum(part) / 5 for part in (stage.losses[:5], stage.losses[-5:]))
    assert end < 0.95 * start
    assert stage.evaluations[-1]["loss"] < stage.evaluations[0]["loss"]
    expected = 3840 if objective == "masked" else 50 * 512
    assert stage.scored_tokens == pytest.approx(expected, rel=0.1 if objective == "masked" else 0.02)
    assert list((tmp_path / "out" / "logs").rglob("events.*"))
    assert stage.pairs_by_bucket[16] == 0 and 16 not in stage.untrained_buckets, "no offset has it"
    rpb.load(tmp_path / "out")


def test_micro_batches_and_checkpointing_change_nothing(retrofit: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"train": "all", "tokens": 1280, "lengths": {32: 1, 64: 1}, "rate": 1e-3}]
    plain = run(retrofit, tmp_path / "plain", text, {"stages": stages}).stages[0].losses
    for name, changes in {
        "micro": {"micro_tokens": 32},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        found = run(retrofit, tmp_path / name, text, {"stages": stages, **changes}).stages[0].losses
        assert found == pytest.approx(plain, abs=1e-4), name


def test_compiled(retrofit: Path, text: Path, tmp_path: Path) -> None:
    changes = {"stages": [{"train": "all", "tokens": 512, "lengths": {64: 1}, "rate": 1e-3}], "evaluate_tokens": 0}
    plain = run(retrofit, tmp_path / "plain", text, changes).stages[0].losses
    found = run(retrofit, tmp_path / "compiled", text, {**changes, "compile": True}).stages[0].losses
    assert found == pytest.approx(plain, abs=1e-4)


def test_bfloat16_keeps_float32_masters(source: Path, text: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    rpb_less(source).to(torch.bfloat16).save_pretrained(half)
    for file in source.glob("tokenizer*"):
        (half / file.name).write_bytes(file.read_bytes())
    retrofit = write_retrofit(half, tmp_path / "retrofit")
    # Steps too small for bfloat16's eight bits, which masters add up.
    stages = [{"train": "all", "tokens": 5120, "lengths": {64: 1}, "rate": 1e-5, "decay": "constant"}]
    run(retrofit, tmp_path / "out", text, {"stages": stages, "precision": "bf16"})
    before, after = weights(retrofit), weights(tmp_path / "out")
    assert {str(tensor.dtype) for name, tensor in after.items() if "relative" in name} == {"torch.float32"}
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16
    size = before[name].abs()
    some = (size > 1 / 64) & (size < 1 / 32)  # half a bit of these, 3e-5, is three steps
    assert (before[name] != after[name])[some].float().mean() > 0.3


# --- a run survives ------------------------------------------------------------------------------------------------


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
    take, steps = Stepper.take, 0

    def step(self: Stepper, interruption: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 13:  # the third of the second stage, which saves after every fifth
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, interruption)

    monkeypatch.setattr(Stepper, "take", step)
    with pytest.raises(InterruptedRunError, match="SIGTERM after step 3 of 30 of stage 2"):
        run(retrofit, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    run(retrofit, tmp_path / "out", text)
    assert steps == 40, "nothing is trained twice"
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


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_folder_in_the_way_costs_nothing(
    retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Stepper.take

    def step(self: Stepper, interruption: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        return take(self, interruption)

    monkeypatch.setattr(Stepper, "take", step)
    with pytest.raises(CheckpointError, match="out' exists already"):
        run(retrofit, tmp_path / "out", text)
    monkeypatch.undo()
    assert (tmp_path / "out.run" / "stage-1").is_dir()
    (tmp_path / "out").rmdir()
    run(retrofit, tmp_path / "out", text)


def test_both_arms_go_on(retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, steps = Stepper.take, 0

    def step(self: Stepper, interruption: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, interruption)

    monkeypatch.setattr(Stepper, "take", step)
    changes = {"stages": [{"tokens": 256, "lengths": {64: 1}}]}
    with pytest.raises(InterruptedRunError, match="after step 1 of 2"):
        run_arms(retrofit, tmp_path / "out", text, changes)
    both = run_arms(retrofit, tmp_path / "out", text, changes)
    assert steps == 4 and list(both) == ["retrofit", "control"]
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


def test_a_gradient_that_is_no_number(
    retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, name = step_module.optimizer_of, "model.layers.1.mlp.down_proj.weight"

    def hooked(model: Any, *args: Any) -> Any:
        model.get_parameter(name).register_hook(lambda grad: grad * math.nan)
        return prepare(model, *args)

    monkeypatch.setattr(step_module, "optimizer_of", hooked)
    with pytest.raises(TrainingError, match=f"norm of the gradients is nan; the first gradient .* is {name}"):
        run(retrofit, tmp_path / "out", text, {"stages": [{"tokens": 640, "lengths": {64: 1}}]})


def poison(monkeypatch: pytest.MonkeyPatch, at: int, name: str = UP, factor: float = math.inf) -> None:
    """One step with a weight multiplied by a factor."""
    take, steps = Stepper.take, 0

    def step(self: Stepper, interruption: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != at:
            return take(self, interruption)
        weight = self.model.get_parameter(name)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight *= factor
        try:
            return take(self, interruption)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    monkeypatch.setattr(Stepper, "take", step)


def test_a_loss_that_is_no_number_stops_the_run(
    retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, at=17)
    with pytest.raises(TrainingError, match=r"step 7 of stage 2 on rank 0: the loss is nan; .*layers\.1\.mlp\.up_proj"):
        run(retrofit, tmp_path / "out", text)
    checkpoint = Checkpoints(tmp_path / "out.run" / "stage-2.checkpoints", 2).last()
    assert checkpoint is not None and checkpoint.meta["progress"]["step"] == 5


def test_or_the_step_is_skipped(retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, at=17)
    summary = run(retrofit, tmp_path / "out", text, {"on_bad_step": "skip"})
    assert len(summary.stages[1].skipped) == 1 and "step 7" in summary.stages[1].skipped[0]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
    assert "1 steps skipped" in str(summary)


def test_a_spike_is_a_bad_step(retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, at=35, name="lm_head.weight", factor=30.0)
    with pytest.raises(
        TrainingError, match=r"step 25 of stage 2: the loss is .*, where the last 20 steps had .*spike=5"
    ):
        run(retrofit, tmp_path / "out", text)


# --- going on from what is damaged -----------------------------------------------------------------------------------


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
    ("damage", "files", "left", "said"), DAMAGE, ids=lambda value: getattr(value, "__name__", str(value).split("/")[-1])
)
def test_going_on_from_what_is_damaged(
    damage: Callable[[Path], None],
    files: str,
    left: int,
    said: str,
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
    take, steps, lines = Stepper.take, 0, list[str]()

    def step(self: Stepper, interruption: Any) -> Any:
        nonlocal steps
        steps += 1
        return take(self, interruption)

    monkeypatch.setattr(Stepper, "take", step)
    run(retrofit, tmp_path / "out", text, say=lines.append)
    assert steps == left and any(re.search(said, line) for line in lines), lines
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


def test_a_summary_that_is_none(whole: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    summary = json.loads((whole / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(summary))
    assert str(read_summary(tmp_path)) == str(read_summary(whole))
    stage = summary["stages"][0]
    for content, said in (
        ("[" * 100_000, "nested too deeply"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "is not what `rpb finetune` writes: identity: Field required"),
        ({**summary, "stages": []}, "stages: List should have at least 1 item"),
        ({**summary, "stages": [1]}, r"stages.0: "),
        ({**summary, "stages": [{**stage, "pairs_by_bucket": [None]}]}, "stages.0.pairs_by_bucket.0"),
        ({**summary, "stages": [{**stage, "evaluations": [{"loss": 1.0}]}]}, "stages.0.evaluations.0.by_length"),
        ({**summary, "identity": {}}, "identity.model: Field required"),
    ):
        (tmp_path / "training.json").write_text(content if isinstance(content, str) else json.dumps(content))
        for read in (read_summary, lambda folder: trained_pairs(str(folder))):
            with pytest.raises(CheckpointError, match=said) as caught:
                read(tmp_path)
            assert "\n" not in str(caught.value)


# --- many processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"])
def test_two_processes_are_one(mode: str, retrofit: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text())
    done = launch(mode, retrofit, tmp_path / "out", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), abs=1e-4)
    one, two = weights(whole), weights(tmp_path / "out")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    known = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert (summary["processes"], summary["mode"]) == (2, known.get(mode, "DEEPSPEED"))
    rpb.load(tmp_path / "out")


def test_a_bare_encoder_on_two_processes(text: Path, whole: Path, tmp_path: Path) -> None:
    """Its pooler has no gradient, which DDP would wait for."""
    retrofit = write_retrofit(write_encoder(tmp_path / "source", head=False), tmp_path / "retrofit")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text().replace("next-token", "distillation"))
    done = launch("ddp", retrofit, tmp_path / "out", recipe)
    assert done.returncode == 0, done.stderr[-2000:]


def test_going_on_in_another_way(retrofit: Path, text: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    poisoned = {"spike": 1e-9, "stages": [{"train": "all", "tokens": 3840, "lengths": {64: 1}}]}
    with pytest.raises(TrainingError, match="spike"):
        run(retrofit, out, text, poisoned)
    settings = {**RECIPE, "data": [{"name": str(text)}], **poisoned}
    recipe.write_text(Recipe.model_validate(settings).to_yaml())
    done = launch("fsdp2", retrofit, out, recipe)
    assert done.returncode != 0
    assert "holds whole weights, and this run has FSDP2's ones: go on as it was begun, or --restart" in done.stderr


def test_tables_stay_float32_under_fsdp2(retrofit: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """In bfloat16 FSDP2 casts what it shards, and rounded tables are refused by the attention: they have their own
    groups."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text().replace("precision: 'no'", "precision: bf16"))
    done = launch("fsdp2", retrofit, tmp_path / "out", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    run(retrofit, tmp_path / "one", text, {"precision": "bf16"})
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=5e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "out")
    tables = [name for name in one if "relative_attention_bias" in name]
    for name in tables:
        torch.testing.assert_close(two[name], one[name], atol=2e-2, rtol=0)
    assert tables and not torch.equal(one[tables[0]], weights(retrofit)[tables[0]])


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2-full"])
def test_a_killed_rank_ends_the_launcher(mode: str, retrofit: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((whole / "recipe.yaml").read_text().replace("save_every: 5", "save_every: 2"))
    out = tmp_path / "out"
    launched = subprocess.Popen(
        command(mode, retrofit, out, recipe), env=environment(), cwd=ROOT, stderr=subprocess.PIPE
    )
    saved = Checkpoints(tmp_path / "out.run" / "stage-2.checkpoints", 2)
    deadline = time.monotonic() + 120
    while saved.last() is None:
        assert launched.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(rank_of(launched.pid, 1), signal.SIGKILL)
    start = time.monotonic()
    _, said = launched.communicate(timeout=60)
    assert launched.returncode != 0 and time.monotonic() - start < 45
    assert b"Signal 9 (SIGKILL)" in said
    kept = [file for file in saved.folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in kept} == {".safetensors", ".json"}, "no pickle"
    assert launch(mode, retrofit, out, recipe).returncode == 0
    assert losses(out) == pytest.approx(losses(whole), abs=1e-4)


def rank_of(parent: int, rank: int) -> int:
    """The process of a rank among a launcher's children."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            if f"PPid:\t{parent}\n" in status and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("no such process")


def command(mode: str, retrofit: Path, out: Path, recipe: Path) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ROOT / "scripts" / "configs" / f"{mode.removesuffix('-full')}-cpu.yaml"
    if mode.endswith("-full"):
        launcher += ["--fsdp_state_dict_type", "FULL_STATE_DICT"]
    port = str(random.randint(20_000, 60_000))
    program = [str(ROOT / "scripts" / "finetune.py"), str(retrofit), str(out), "--recipe", str(recipe)]
    return [*launcher, "--config_file", str(config), "--main_process_port", port, *program]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def launch(mode: str, retrofit: Path, out: Path, recipe: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(mode, retrofit, out, recipe), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_lengths_that_the_source_does_not_know(text: Path, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "source", head=True)  # 128 positions
    retrofit = write_retrofit(source, tmp_path / "retrofit")
    changes: dict[str, Any] = {"batch_tokens": 256, "stages": [{"tokens": 512, "lengths": {256: 1}}]}
    with pytest.raises(ConfigError, match="256 tokens, and the source has 128 learned positions"):
        run(retrofit, tmp_path / "out", text, {**changes, "objective": "distillation"})
    with pytest.raises(ConfigError, match="256 tokens, and the source has 128 learned positions"):
        run(retrofit, tmp_path / "out", text, {**changes, "objective": "masked"}, control=True)
    run(retrofit, tmp_path / "out", text, {**changes, "objective": "masked"})


def test_wrong_input(retrofit: Path, source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short a text")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 50)
    (tmp_path / "rows.jsonl").write_text('{"body": "no column"}\n')
    (tmp_path / "taken").mkdir()
    out = tmp_path / "out"

    def data(name: str) -> dict[str, Any]:
        return {"data": [{"name": str(tmp_path / name)}], "evaluate_tokens": 0}

    for error, pattern, arguments in [
        (DataError, r"empty.txt' holds no text", (retrofit, out, text, data("empty.txt"))),
        (DataError, r"has \d+ tokens, fewer than one sequence of 64", (retrofit, out, text, data("short.txt"))),
        (DataError, r"latin.txt' is not UTF-8", (retrofit, out, text, data("latin.txt"))),
        (DataError, r"no column 'text', only body", (retrofit, out, text, data("rows.jsonl"))),
        (DataError, r"absent.txt': no such file", (retrofit, out, text, data("absent.txt"))),
        (DataError, r"models\d+' is a folder", (retrofit, out, text, {"data": [{"name": str(source.parent)}]})),
        (ConfigError, r"OUT '\.' has no name", (retrofit, Path("."), text)),
        (ConfigError, r"precision='fp16': a CPU has none", (retrofit, out, text, {"precision": "fp16"})),
        (ConfigError, r"trackers: 'wandb' is not installed", (retrofit, out, text, {"trackers": ["wandb"]})),
        (NotRetrofittedError, r"is not a retrofit: make one", (source, out, text)),
        (CheckpointError, r"taken' exists already", (retrofit, tmp_path / "taken", text)),
        (ConfigError, r"objective=masked: .*causal.*choose next-token", (retrofit, out, text, {"objective": "masked"})),
        (ConfigError, r"Accelerate refuses .*nosuch", (retrofit, out, text, {"trackers": ["nosuch"]})),
    ]:
        with pytest.raises(error, match=pattern) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value)
        assert not out.exists()
    small = tmp_path / "small"
    model = rpb.load(retrofit)
    model.resize_token_embeddings(300)
    model.save_pretrained(small)
    for file in retrofit.glob("tokenizer*"):
        (small / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"has 512 tokens, its model 300: wrong tokenizer"):
        run(small, out, text)


def test_going_on_with_something_else(
    retrofit: Path, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    poison(monkeypatch, at=17)
    with pytest.raises(TrainingError):
        run(retrofit, out, text)
    monkeypatch.undo()
    stages = [{**stage} for stage in RECIPE["stages"]]
    stages[1]["rate"] = 2e-3
    with pytest.raises(ConfigError, match=r"recipe.stages.1.rate=0.001, not 0.002: .*--restart"):
        run(retrofit, out, text, {"stages": stages})
    other = write_retrofit(source, tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"out.run' holds a run with model="):
        run(other, out, text)
    run(other, out, text, restart=True)
    assert out.exists()
    (tmp_path / "text.txt").write_text(PROSE)
    poison(monkeypatch, at=17)
    with pytest.raises(TrainingError):
        run(retrofit, tmp_path / "again", tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text(PROSE[:-9])
    with pytest.raises(ConfigError, match=r"again.run' holds a run with texts"):
        run(retrofit, tmp_path / "again", tmp_path / "text.txt")


def test_two_runs_for_one_folder(retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, tried = Stepper.take, []

    def step(self: Stepper, interruption: Any) -> Any:
        if not tried:
            tried.append(True)
            with pytest.raises(CheckpointError, match=r"out.run' is in use by another run"):
                run(retrofit, tmp_path / "out", text)
        return take(self, interruption)

    monkeypatch.setattr(Stepper, "take", step)
    run(retrofit, tmp_path / "out", text)
    assert tried


def test_a_batch_too_large_for_memory(
    retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Stepper._pass

    def limited(self: Stepper, batch: Any, scored: int) -> Tensor:
        if batch.input_ids.numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take(self, batch, scored)

    monkeypatch.setattr(Stepper, "_pass", limited)
    changes: dict[str, Any] = {"batch_tokens": 512, "stages": [{"tokens": 1024, "lengths": {64: 1}}]}
    with pytest.raises(ConfigError, match=r"8 sequences of 64 tokens at once do not fit.*2 do: set micro_tokens=128"):
        run(retrofit, tmp_path / "out", text, changes)
    run(retrofit, tmp_path / "out", text, {**changes, "micro_tokens": 128}, restart=True)
    changes["stages"][0]["lengths"] = {256: 1}
    with pytest.raises(ConfigError, match=r"2 sequences of 256 tokens .* nor does one: use shorter lengths"):
        run(retrofit, tmp_path / "again", text, changes)


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
