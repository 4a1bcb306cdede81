"""Attention as something to learn from: who compares it leaves both models as they were."""

from __future__ import annotations

from contextlib import closing

import pytest

import rpb_retrofit as rpb
from rpb_retrofit.training.relations import Relations
from tests.families.cases import BY_NAME
from tests.support.module_state import module_state
from tests.support.tiny_models import build, inputs_of, tokens


def test_both_models_are_left_as_they_were() -> None:
    case = BY_NAME["llama"]
    student, teacher = build(case), build(case)
    rpb.retrofit(student, rpb.RetrofitConfig(init="zeros"))
    student(**inputs_of(case, tokens()))  # a retrofit notes how its attention ran
    before = module_state(student.train()), module_state(teacher.eval())
    with closing(Relations(student, teacher)) as relations:
        assert (module_state(student), module_state(teacher)) != before
        for model in (student, teacher):
            model(**inputs_of(case, tokens()))
        assert relations.apart().item() > 0
    assert (module_state(student), module_state(teacher)) == before


def test_a_source_is_at_no_distance_from_itself() -> None:
    case = BY_NAME["llama"]
    model, twin = build(case).train(), build(case).eval()
    with closing(Relations(model, twin)) as relations:
        for each in (model, twin):
            each(**inputs_of(case, tokens()))
        assert relations.apart().item() == pytest.approx(0.0, abs=1e-6)


def test_a_second_model_that_hands_out_no_rows_leaves_the_first_alone() -> None:
    student, teacher = build(BY_NAME["llama"]), build(BY_NAME["bloom"])
    before = module_state(student)
    with pytest.raises(rpb.errors.ConfigError, match="BloomForCausalLM has attention of its own"):
        Relations(student, teacher)
    assert module_state(student) == before
