"""A retrofit that is stopped, wherever it stands, leaves the source as it was."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import rpb_retrofit as rpb
from tests.families.cases import Case
from tests.support.module_state import module_state
from tests.support.tiny_models import build, families, inputs_of, tokens

STAGES = {
    "the first table is put in": ("rpb_retrofit.runtime.attach.on", 1),
    "the second table is put in": ("rpb_retrofit.runtime.attach.on", 2),
    "positions are followed": ("rpb_retrofit.runtime.attach._follow_positions", 1),
    "a class is changed": ("rpb_retrofit.runtime.modeling.lock", 1),
    "tables are filled": ("rpb_retrofit.swap.inplace.fill", 1),
    "checksums are recorded": ("rpb_retrofit.swap.inplace.record", 1),
}
"""Where it stops: the function that is interrupted, at which of its calls."""


@families("llama", "falcon", "gpt2", "pegasus", "bart", "t5")
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_leaves_the_source(stage: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(case).eval()
    inputs = inputs_of(case, tokens())
    with torch.no_grad():
        want = model(**inputs)[0]
    before, hooks = module_state(model), hooks_of(model)
    kind, calls = type(model), 0
    name, last = STAGES[stage]
    owner, _, function = name.rpartition(".")
    module = importlib.import_module(owner)
    real = getattr(module, function)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    assert type(model) is kind and hooks_of(model) == hooks
    assert module_state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], want)
    rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))  # and it can be retrofitted as ever
    rpb.revert(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], want)


def hooks_of(model: torch.nn.Module) -> list[int]:
    """How many hooks hang on each module."""
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
