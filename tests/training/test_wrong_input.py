"""What a run says of wrong input, of steps that went wrong, and of another run's folder: one clear line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.open_models import trained_pairs
from rpb_retrofit.errors import CheckpointError, ConfigError, DataError, NotRetrofittedError, TrainingError
from rpb_retrofit.training import step as step_module
from rpb_retrofit.training.checkpoints import Checkpoints
from rpb_retrofit.training.step import Stepper
from rpb_retrofit.training.summary import read_summary
from tests.support.tensors import weights_of
from tests.support.training_cases import PROSE, RECIPE, poison, run, watch_steps, write_encoder, write_retrofit


def test_a_folder_in_the_way_costs_nothing(
    retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_steps(monkeypatch, lambda number: (tmp_path / "out").mkdir(exist_ok=True))
    with pytest.raises(CheckpointError, match="out' exists already"):
        run(retrofit, tmp_path / "out", text)
    monkeypatch.undo()
    assert (tmp_path / "out.run" / "stage-1").is_dir()
    (tmp_path / "out").rmdir()
    run(retrofit, tmp_path / "out", text)


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
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "out").values())
    assert "1 steps skipped" in str(summary)


def test_a_spike_is_a_bad_step(retrofit: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, at=35, name="lm_head.weight", factor=30.0)
    with pytest.raises(
        TrainingError, match=r"step 25 of stage 2: the loss is .*, where the last 20 steps had .*spike=5"
    ):
        run(retrofit, tmp_path / "out", text)


def test_a_summary_that_is_none(whole: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    summary = json.loads((whole / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(summary))
    assert str(read_summary(tmp_path)) == str(read_summary(whole))
    stage = summary["stages"][0]
    for content, message in (
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
            with pytest.raises(CheckpointError, match=message) as caught:
                read(tmp_path)
            assert "\n" not in str(caught.value)


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
    def another_run(number: int) -> None:
        if number == 1:
            with pytest.raises(CheckpointError, match=r"out.run' is in use by another run"):
                run(retrofit, tmp_path / "out", text)

    steps = watch_steps(monkeypatch, another_run)
    run(retrofit, tmp_path / "out", text)
    assert len(steps) == 40


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
