"""What a model is made of, as its `Anatomy` says, against what its attention is really called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rpb_retrofit as rpb
from rpb_retrofit.instruments.interception import Attend, intercepted
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.tables.recording import run
from tests.families.cases import BY_NAME, CASES, Case
from tests.support.tiny_models import build, tokens

SERVED = [case for case in CASES if Anatomy.of(build(case)).family.uses_interface]


def listened(case: Case) -> Anatomy:
    """The anatomy of a model whose attention can be listened to: T5's has tables of its own until it is retrofitted."""
    model = build(case).eval()
    if Anatomy.of(model).family.mechanism == "t5":
        rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    return Anatomy.of(model)


def calls_of(anatomy: Anatomy, length: int) -> dict[str, tuple[Any, ...]]:
    """What each attention is called with on a window: query, key, and the interface's keywords."""
    calls: dict[str, tuple[Any, ...]] = {}

    def wrap(name: str, attend: Attend) -> Attend:
        def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
            calls[name] = query, key, kwargs
            return attend(module, query, key, value, mask, **kwargs)

        return listen

    with intercepted(anatomy, wrap):
        run(anatomy.model, tokens(1, length)[0])
    return calls


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_facts_are_what_attention_is_called_with(case: Case) -> None:
    anatomy = listened(case)
    calls = calls_of(anatomy, 12)
    assert calls.keys() == anatomy.attentions.keys()
    for name, (query, key, kwargs) in calls.items():
        facts = anatomy.facts(name)
        assert facts.heads == query.shape[1]
        assert facts.key_heads == key.shape[1]
        assert facts.width == query.shape[-1]
        passed = query.shape[-1] ** -0.5 if case.family == "opt" else kwargs["scaling"]  # OPT scales its queries
        assert facts.scale == (None if case.family == "modernbert" else pytest.approx(passed)), "one does not say it"
        assert facts.sinks == (kwargs.get("s_aux") is not None)


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_only_causal_attention_sees_no_later_key(case: Case) -> None:
    """Whether the first attention's earlier outputs change with its last value says which it is."""
    anatomy = listened(case)
    first = next(iter(anatomy.attentions))
    outputs: list[Tensor] = []

    def moving(move: float, name: str, attend: Attend) -> Attend:
        def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            value = value.index_add(2, torch.tensor([value.shape[2] - 1]), torch.full_like(value[:, :, :1], move))
            output, weights = attend(module, query, key, value, *args, **kwargs)
            outputs.append(output[:, :-1])
            return output, weights

        return listen

    for move in (0.0, 1.0):
        with intercepted(anatomy, partial(moving, move), [first]):
            run(anatomy.model, tokens(1, 12)[0])
    assert anatomy.facts(first).causal == torch.equal(*outputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_holds_before_and_after_a_retrofit(case: Case) -> None:
    model = build(case)
    anatomy = Anatomy.of(model)
    before = anatomy.context, anatomy.blocks, anatomy.rotary_counts, {n: anatomy.facts(n) for n in anatomy.attentions}
    rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
    again = Anatomy.of(model)
    after = again.context, again.blocks, again.rotary_counts, {n: again.facts(n) for n in again.attentions}
    assert after == before
    assert list(again.attentions.values()) == list(anatomy.attentions.values())
    assert {again.block_of(name) for name in again.attentions} == set(again.blocks)


def test_a_window_is_the_layers_own() -> None:
    gemma = Anatomy.of(build(BY_NAME["gemma2"]))
    windows = [gemma.facts(name).window for name in gemma.attentions]
    kinds = gemma.model.config.layer_types
    assert [window is not None for window in windows] == [kind == "sliding_attention" for kind in kinds]
    assert gemma.model.config.sliding_window in windows
    mistral = Anatomy.of(build(BY_NAME["mistral"]))
    assert {mistral.facts(name).window for name in mistral.attentions} == {mistral.model.config.sliding_window}
    llama = Anatomy.of(build(BY_NAME["llama"]))
    assert {llama.facts(name).window for name in llama.attentions} == {None}


def test_models_that_share_a_config_share_one() -> None:
    model = build(BY_NAME["bart"])
    anatomy = Anatomy.of(model)
    configs = anatomy.configs
    assert len({id(config) for config in configs}) == len(configs) <= len(anatomy.submodels)
    assert {id(m.config) for m in model.modules() if hasattr(m, "config") and m in anatomy.submodels} == set(
        map(id, configs)
    )
