"""Instruments leave a model as they found it, also where what runs inside them fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch

import rpb_retrofit as rpb
from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.instruments.modes import eager, evaluating
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.tables.recording import run
from tests.families.cases import BY_NAME
from tests.support.module_state import module_state
from tests.support.tiny_models import build, inputs_of, tokens


class Failure(Exception):  # noqa: N818 - it stands for any
    """What goes wrong inside."""


def untouched(name: str, attend: Attend) -> Attend:
    """The attention as it is, called through something else."""
    return partial(attend)


def failing(name: str, attend: Attend) -> Attend:
    """An attention that fails."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Failure

    return fail


INSTRUMENTS: dict[str, Callable[[Anatomy], AbstractContextManager[None]]] = {
    "evaluating": lambda anatomy: evaluating(anatomy.model),
    "eager": eager,
    "intercepted": lambda anatomy: intercepted(anatomy, untouched),
    "intercepted, one": lambda anatomy: intercepted(anatomy, untouched, [next(iter(anatomy.attentions))]),
    "intercepted, without a bias": lambda anatomy: intercepted(anatomy, untouched, with_bias=False),
}


APPLICABLE = [
    (instrument, family)
    for family in ("llama", "bart", "t5", "bloom")
    for instrument in INSTRUMENTS
    if family != "bloom" or "intercepted" not in instrument  # whose attention does not use the interface
]


@pytest.mark.parametrize(("instrument", "family"), APPLICABLE, ids=map("-".join, APPLICABLE))
@pytest.mark.parametrize("retrofitted", [False, True], ids=["source", "retrofit"])
def test_a_model_is_left_as_it_was(instrument: str, retrofitted: bool, family: str) -> None:
    model = build(BY_NAME[family])
    model.train()
    next(model.children()).eval()  # one part that evaluates, as a frozen one may
    if retrofitted:
        rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    anatomy, before = Anatomy.of(model), module_state(model)
    with INSTRUMENTS[instrument](anatomy):
        changed = module_state(model) != before
    assert changed or (instrument == "eager" and family == "bloom"), "it did something"
    assert module_state(model) == before
    with pytest.raises(Failure), INSTRUMENTS[instrument](anatomy):
        raise Failure
    assert module_state(model) == before


@pytest.mark.parametrize("family", ["llama", "bert", "bart", "gemma3_text"])
def test_a_source_intercepted_computes_what_it_computes(family: str) -> None:
    model = build(BY_NAME[family]).eval()
    inputs = inputs_of(BY_NAME[family], tokens())
    with torch.no_grad():
        want = model(**inputs)[0]
        for with_bias in (True, False):
            with intercepted(Anatomy.of(model), untouched, with_bias=with_bias):
                torch.testing.assert_close(model(**inputs)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("retrofitted", [False, True], ids=["source", "retrofit"])
def test_what_is_put_in_its_place_runs(retrofitted: bool) -> None:
    model = build(BY_NAME["llama"]).eval()
    if retrofitted:
        rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    before = module_state(model)
    with pytest.raises(Failure), intercepted(Anatomy.of(model), failing):
        run(model, tokens(1, 8)[0])
    assert module_state(model) == before
    run(model, tokens(1, 8)[0])


def test_evaluating_gives_each_module_its_mode_back() -> None:
    model = build(BY_NAME["bert"]).train()
    frozen = model.get_submodule("bert.encoder.layer.0")
    frozen.eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
