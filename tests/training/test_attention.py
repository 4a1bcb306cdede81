"""Each attention by itself: what is compared, what has gradients, what is left as it was."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import PreTrainedModel

import rpb_retrofit as rpb
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.training.attention import AttentionMatch
from rpb_retrofit.training.batches import Batch, Layout, collate
from rpb_retrofit.training.recipe import Recipe
from tests.families.cases import BY_NAME, CASES, Case
from tests.support.module_state import module_state
from tests.support.tensors import assert_close, weights_of
from tests.support.tiny_models import build
from tests.support.training_cases import RECIPE, losses, run
from tests.training.test_processes import launch

NONE = torch.empty(0, dtype=torch.long)
ATTENTION = {"objective": "distillation", "stages": [{"train": "attention", "tokens": 3840, "lengths": {64: 1}}]}
LEARNERS = [case for case in CASES if case.kind != "seq2seq" and case.family not in ("bloom", "mpt", "falcon")]


def rows(packed: bool) -> Batch:
    """Two rows, the first of two documents or padded."""
    generator = torch.Generator().manual_seed(1)
    first, second, third = (torch.randint(3, 61, (n,), generator=generator) for n in (9, 5, 14))
    return collate([[first, second] if packed else [first], [third]], 14, Layout(packed, True, NONE, NONE, 0))


def still(case: Case) -> PreTrainedModel:
    """A tiny model without dropout, as a recipe makes it."""
    model = build(case)
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def missed(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with closing(AttentionMatch(student.train(), teacher.eval())) as match:
        return match(student, batch) / batch.scored


@pytest.mark.parametrize("packed", [True, False])
def test_against_attention_called_by_hand(packed: bool) -> None:
    """Of a Llama: the states that go into each of the teacher's attentions, given to both."""
    case = BY_NAME["llama"]
    student, teacher = build(case), build(case).double()
    rpb.retrofit(student, rpb.RetrofitConfig(init="alibi"))
    batch = rows(packed)
    found = missed(student.double(), teacher, batch)
    positions = torch.arange(14)[None].expand(2, -1) if batch.position_ids is None else batch.position_ids
    documents = (positions == 0).cumsum(1)
    hidden = (documents[:, :, None] != documents[:, None]) | ~torch.ones(14, 14, dtype=torch.bool).tril()
    mask = torch.zeros(2, 1, 14, 14, dtype=torch.double).masked_fill(hidden[:, None], -torch.inf)
    teacher.config._attn_implementation = student.config._attn_implementation_internal = "eager"
    states, shares = teacher.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states, []
    scored = batch.target != -100
    for number in range(len(teacher.model.layers)):
        outputs = []
        for model in (student, teacher):
            layer = model.model.layers[number]
            given = teacher.model.layers[number].input_layernorm(states[number])
            turned = model.model.rotary_emb(given, positions)
            bias = 0.0
            if model is student:
                distance = (positions[:, :, None] - positions[:, None]).clamp(min=0)
                bias = layer.self_attn.relative_attention_bias(distance.flatten()).double()
                bias = bias.unflatten(-1, distance.shape).transpose(0, 1)
            attend = layer.self_attn
            query, key, value = (
                project(given).unflatten(-1, (-1, attend.head_dim)).transpose(1, 2)
                for project in (attend.q_proj, attend.k_proj, attend.v_proj)
            )
            cosine, sine = (x[:, None] for x in turned)
            query, key = (
                x * cosine + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sine
                for x in (query, key)
            )
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
            weights = (query @ key.mT * attend.head_dim**-0.5 + bias + mask).softmax(-1)
            outputs.append(attend.o_proj((weights @ value).transpose(1, 2).flatten(2))[scored])
        own, wanted = outputs
        shares.append((own - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert found.item() == pytest.approx(torch.stack(shares).mean().item(), rel=1e-5) and found > 0.01


@pytest.mark.parametrize("case", LEARNERS, ids=str)
def test_a_twin_misses_nothing_and_only_attention_learns(case: Case) -> None:
    batch = rows(packed=False)
    assert missed(still(case), still(case), batch).item() == pytest.approx(0, abs=1e-9)
    student = still(case)
    rpb.retrofit(student, rpb.RetrofitConfig(init="normal"))
    student.requires_grad_(False)
    attentions = Anatomy.of(student).attentions
    for attention in attentions.values():
        attention.requires_grad_(True)
    share = missed(student, still(case), batch)
    share.backward()
    assert share.item() > 1e-6
    inside = {id(p) for attention in attentions.values() for p in attention.parameters()}
    assert {id(p) for p in student.parameters() if p.grad is not None} == inside


def test_both_models_are_left_as_they_were() -> None:
    student, teacher = build(BY_NAME["llama"]), build(BY_NAME["llama"])
    rpb.retrofit(student, rpb.RetrofitConfig(init="zeros"))
    student(torch.arange(3, 9)[None])  # a retrofit notes how its attention ran
    before = module_state(student.train()), module_state(teacher.eval())
    missed(student, teacher, rows(packed=True))
    assert (module_state(student), module_state(teacher)) == before
    with pytest.raises(rpb.errors.ConfigError, match="BloomForCausalLM has attention of its own"):
        AttentionMatch(student, build(BY_NAME["bloom"]))
    assert module_state(student) == before[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stage(checkpointing: bool, source: Path, retrofit: Path, text: Path, tmp_path: Path) -> None:
    """It trains the attention modules and nothing else, and a control has nothing to learn."""
    stage = {"train": "attention", "tokens": 12_800, "lengths": {64: 1}, "rate": 2e-3, "table_rate": 0.1}
    changes = {"objective": "distillation", "stages": [stage], "gradient_checkpointing": checkpointing}
    (done,) = run(retrofit, tmp_path / "out", text, changes).stages
    assert fmean(done.losses[-5:]) < 0.7 * fmean(done.losses[:5])
    before, after = weights_of(retrofit), weights_of(tmp_path / "out")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ".self_attn." in n}
    control = run(retrofit, tmp_path / "control", text, changes, control=True)
    assert max(control.stages[0].losses) < 1e-9


@pytest.mark.process
def test_two_processes_are_one(retrofit: Path, text: Path, tmp_path: Path) -> None:
    run(retrofit, tmp_path / "one", text, ATTENTION)
    done = launch("ddp", retrofit, tmp_path / "two", tmp_path / "one" / "recipe.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), atol=1e-4, rtol=1e-3)


@pytest.mark.process
@pytest.mark.parametrize("mode", ["fsdp2", "deepspeed-zero2"])
def test_sharded_weights_are_refused(mode: str, retrofit: Path, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**RECIPE, "data": [{"name": str(text)}], **ATTENTION})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = launch(mode, retrofit, tmp_path / "out", tmp_path / "recipe.yaml")
    assert done.returncode != 0 and "train=attention: not with" in done.stderr
