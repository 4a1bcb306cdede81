"""Fine-tuning: what a run trains, what it minimises, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rpb_retrofit as rpb
from tests.support.tensors import weights_of
from tests.support.training_cases import run, write_encoder, write_retrofit


def plain_model(folder: Path) -> Any:
    """As Transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder)


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
    before, after = weights_of(retrofit), weights_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "relative_attention_bias" in name}


def test_lora_is_merged(retrofit: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"train": "lora", "tokens": 1280, "lengths": {64: 1}, "lora_rank": 4, "rate": 1e-3}]
    run(retrofit, tmp_path / "out", text, {"stages": stages})
    before, after = weights_of(retrofit), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "relative_attention_bias" in name or "_proj." in name}
    name = "model.layers.0.mlp.up_proj.weight"
    rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-6)
    assert rank == 4


def test_distillation_from_the_source(source: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"train": "all", "tokens": 5120, "lengths": {64: 1}, "rate": 1e-3}]
    lines: list[str] = []
    changes = {"objective": "distillation", "stages": [{"train": "tables", "tokens": 128, "lengths": {64: 1}}, *stages]}
    summary = run(retrofit, tmp_path / "out", text, changes, say=lines.append)
    kl = [loss for stage in summary.stages for loss in stage.losses]
    assert fmean(kl[-8:]) < 0.9 * fmean(kl[:8])  # one batch alone is easier or harder than another
    size = sum(p.numel() for p in rpb.load(retrofit).parameters()) * 4 / 1e6
    spared = next(float(line.split()[5]) for line in lines if "shares" in line)
    assert spared == pytest.approx(size, abs=1), "while tables are trained the source costs no second copy"
    control = run(retrofit, tmp_path / "control", text, changes, control=True)
    assert max(loss for stage in control.stages for loss in stage.losses) < 1e-6
    own = weights_of(tmp_path / "control")
    assert all(torch.equal(own[name], tensor) for name, tensor in weights_of(source).items()), "it had nothing to learn"


def test_the_control_sees_the_same_tokens(
    source: Path, retrofit: Path, text: Path, tmp_path: Path, whole: Path
) -> None:
    summary = run(retrofit, tmp_path / "control", text, control=True)
    retrofitted = json.loads((whole / "training.json").read_text())
    assert [s.scored_tokens for s in summary.stages] == [s["scored_tokens"] for s in retrofitted["stages"]]
    model = plain_model(tmp_path / "control")
    assert type(model).__name__ == "LlamaForCausalLM"
    before = weights_of(source)
    changed = {
        name for name, tensor in weights_of(tmp_path / "control").items() if not torch.equal(tensor, before[name])
    }
    assert changed == before.keys()


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
    trained, wanted = weights_of(tmp_path / "out"), weights_of(retrofit)
    for name in (name for name in wanted if "relative_attention_bias" in name):
        near, far = trained[name][:, :24], wanted[name][:, :24]  # buckets with many pairs in 64 tokens
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
        result = run(retrofit, tmp_path / name, text, {"stages": stages, **changes}).stages[0].losses
        assert result == pytest.approx(plain, abs=1e-4), name


def test_repeats_are_planted_in_what_is_trained_on(retrofit: Path, text: Path, tmp_path: Path) -> None:
    """Half of the tokens come again; what is held out stays as it is."""
    stages = [{"train": "all", "tokens": 5120, "lengths": {64: 1}, "rate": 1e-3}]
    plain, planted = (
        run(retrofit, tmp_path / f"{share}", text, {"stages": stages, "repeats": share}).stages[0] for share in (0, 0.5)
    )
    assert plain.scored_tokens == planted.scored_tokens and plain.losses[0] != planted.losses[0]
    assert plain.evaluations[0]["loss"] == planted.evaluations[0]["loss"]


def test_compiled(retrofit: Path, text: Path, tmp_path: Path) -> None:
    changes = {"stages": [{"train": "all", "tokens": 512, "lengths": {64: 1}, "rate": 1e-3}], "evaluate_tokens": 0}
    plain = run(retrofit, tmp_path / "plain", text, changes).stages[0].losses
    result = run(retrofit, tmp_path / "compiled", text, {**changes, "compile": True}).stages[0].losses
    assert result == pytest.approx(plain, abs=1e-4)


def test_bfloat16_keeps_float32_masters(source: Path, text: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    plain_model(source).to(torch.bfloat16).save_pretrained(half)
    for file in source.glob("tokenizer*"):
        (half / file.name).write_bytes(file.read_bytes())
    retrofit = write_retrofit(half, tmp_path / "retrofit")
    # Steps too small for bfloat16's eight bits, which masters add up.
    stages = [{"train": "all", "tokens": 5120, "lengths": {64: 1}, "rate": 1e-5, "decay": "constant"}]
    run(retrofit, tmp_path / "out", text, {"stages": stages, "precision": "bf16"})
    before, after = weights_of(retrofit), weights_of(tmp_path / "out")
    assert {str(tensor.dtype) for name, tensor in after.items() if "relative" in name} == {"torch.float32"}
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16
    size = before[name].abs()
    some = (size > 1 / 64) & (size < 1 / 32)  # half a bit of these, 3e-5, is three steps
    assert (before[name] != after[name])[some].float().mean() > 0.3
