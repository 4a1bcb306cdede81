"""The second act of a fit: outputs like the source's, measured as the layer that reads them measures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rpb_retrofit as rpb
from rpb_retrofit.runtime import factor
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.fit import fit
from rpb_retrofit.tables.loss import RowPairs, loss, target_of
from rpb_retrofit.tables.output_metric import metrics
from rpb_retrofit.tables.outputs import SHARE, Outputs, fit_outputs
from rpb_retrofit.tables.parameters import ParameterLayout
from tests.families.cases import BY_NAME
from tests.support.planted import FORMS, Planted, exactly, explicit_scores
from tests.support.tiny_models import build, tokens

VALUE = 5
"""Dimensions of a value: others than those of a key."""


def with_values(planted: Planted, windows: int) -> RowPairs:
    """Rows whose students have values, and whose sources what their own attention makes of values of their own."""
    pairs = []
    for source, student in planted.pairs(windows):
        values = [planted.randn(planted.heads // planted.groups, planted.keys, VALUE) for _ in range(2)]
        weights = probabilities(source.scores, source)
        output = weights @ values[0].repeat_interleave(planted.groups, 0)
        pairs.append((replace(source, output=output), replace(student, value=values[1])))
    return pairs


def probabilities(scores: Tensor, rows: AttentionRows) -> Tensor:
    """The softmax by its definition, a sink's share left out."""
    if rows.sinks is None:
        return scores.softmax(-1)
    sink = rows.sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def some_metric(planted: Planted) -> Tensor:
    root = planted.randn(planted.heads, VALUE, VALUE + 2)
    return root @ root.mT


def explicit_missed(numbers: Tensor, pairs: RowPairs, layout: ParameterLayout, metric: Tensor) -> Tensor:
    """The share of the variance of the source's outputs that is missed, by its definition."""
    of_source = torch.cat([source.output for source, _ in pairs], 1)
    of_student = torch.cat(
        [
            probabilities(explicit_scores(student, layout, numbers), student)
            @ student.value.repeat_interleave(len(student.query) // len(student.value), 0)
            for _, student in pairs
        ],
        1,
    )

    def squares(x: Tensor) -> Tensor:
        return torch.einsum("hrv,hvw,hrw->h", x, metric, x)

    return squares(of_student - of_source) / squares(of_source - of_source.mean(1, keepdim=True))


@settings(max_examples=30, deadline=None)
@given(FORMS, st.booleans(), st.sampled_from([None, 2.0]), st.integers(0, 2**30))
def test_the_term_and_its_gradient(layout: ParameterLayout, sinks: bool, softcap: float | None, seed: int) -> None:
    """In float64, against the definition and autograd through it; the KL stands beside it with its share."""
    planted = Planted(layout, sinks=sinks, softcap=softcap, seed=seed)
    pairs, metric = with_values(planted, 2), some_metric(planted)
    point = (planted.randn(planted.heads, layout.size) / 2).requires_grad_()
    want = explicit_missed(point, pairs, layout, metric)
    (slope,) = torch.autograd.grad(want.sum(), point)
    point = point.detach()
    with pytest.MonkeyPatch.context() as patch:
        exactly(patch)
        patch.setattr("rpb_retrofit.tables.outputs.ROUNDING", 0.0)
        term, target = Outputs.of(pairs, layout, metric), target_of(pairs, layout, torch.float64)
        alone = loss(point, target, pairs, layout)
        both = loss(point, target, pairs, layout, term=term)
    torch.testing.assert_close(both.beside, want.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both.value, SHARE * alone.value + want.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(both.gradient, SHARE * alone.gradient + slope, rtol=1e-7, atol=1e-9)
    assert torch.linalg.eigvalsh(both.hessian).min() > -1e-9, "Gauss and Newton's matrix is never negative"


def test_random_signs_sample_gauss_and_newton() -> None:
    """Over many rows the sampled matrix is the product of the explicit Jacobian with itself, but for the sampling."""
    layout = ParameterLayout(Bucketing(8, 20, False), pairs=factor.RotaryPairs("half", 0, 4))
    planted = Planted(layout, heads=2, keys=120, step=1)
    pairs, metric = with_values(planted, 24), some_metric(planted)
    point = planted.randn(planted.heads, layout.size) / 4
    root = torch.linalg.cholesky(metric)

    def outputs(numbers: Tensor, student: AttentionRows) -> Tensor:
        weights = probabilities(explicit_scores(student, layout, numbers), student)
        return (weights @ student.value.repeat_interleave(2, 0)) @ root

    want = torch.zeros(2, layout.size, layout.size, dtype=torch.double)
    for _, student in pairs:
        jacobian = torch.autograd.functional.jacobian(lambda x, s=student: outputs(x, s), point)
        for head in range(2):
            own = jacobian[head, ..., head, :].flatten(0, 1)
            want[head] += 2 * own.T @ own
    output = torch.cat([source.output for source, _ in pairs], 1)
    centred = (output - output.mean(1, keepdim=True)) @ root
    want /= (centred**2).sum((1, 2))[:, None, None]
    with pytest.MonkeyPatch.context() as patch:
        exactly(patch)
        term = replace(Outputs.of(pairs, layout, metric), share=0.0)
        result = loss(point, target_of(pairs, layout, torch.float64), pairs, layout, term=term).hessian
    for head in range(2):
        assert (result[head] - want[head]).norm() < 0.2 * want[head].norm()


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([Bucketing(8, 20, False), Bucketing(8, 20, True)]), st.booleans(), st.integers(0, 2**30))
def test_a_planted_bias_is_recovered(bucketing: Bucketing, sinks: bool, seed: int) -> None:
    """Where values are the source's, too, the outputs are met and the table is the source's, to 1e-3."""
    planted = Planted(ParameterLayout(bucketing), keys=200, sinks=sinks, seed=seed, dtype=torch.float32)
    pairs = []
    for source, student in planted.pairs(6):
        value = planted.randn(planted.heads // planted.groups, planted.keys, VALUE)
        weights = probabilities(source.scores, source)
        output = weights @ value.repeat_interleave(planted.groups, 0)
        pairs.append((replace(source, output=output), replace(student, value=value)))
    result = fit_outputs(pairs, planted.layout, some_metric(planted))
    visited = result.visits > 20
    fitted, wanted = result.numbers[:, visited], planted.numbers[:, visited]
    if not sinks:
        fitted, wanted = (x - x.mean(1, keepdim=True) for x in (fitted, wanted))
    assert (fitted - wanted).abs().max() < 1e-3
    assert result.missed is not None and result.missed[1].max() < 1e-6


def test_outputs_come_nearer_than_by_attention_alone() -> None:
    """On values whose size varies by key, attention alone misses more; a head that always answers alike still fits."""
    layout = ParameterLayout(Bucketing(8, 20, False))
    planted = Planted(layout, dtype=torch.float32, keys=200)
    pairs = []
    for source, student in with_values(planted, 4):
        value = student.value * planted.randn(1, planted.keys, 1).exp() ** 2
        noisy = replace(source, scores=source.scores + 2 * planted.randn(*source.scores.shape))
        output = probabilities(noisy.scores, noisy) @ value.repeat_interleave(planted.groups, 0)
        output[0] = 1.0
        pairs.append((replace(noisy, output=output), replace(student, value=value)))
    by_attention, result = fit(pairs, layout), fit_outputs(pairs, layout)
    assert result.missed is not None and result.numbers.isfinite().all()
    missed = explicit_missed(by_attention.numbers, pairs, layout, torch.eye(VALUE).expand(planted.heads, -1, -1))
    assert bool((result.missed[1][1:] < missed[1:] + 1e-5).all() and (result.missed[1][1:] < missed[1:] - 1e-5).any())
    torch.testing.assert_close(result.after[0], by_attention.after[0], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert", "bart", "deepseek_v3", "gemma3_text"])
def test_the_reader_is_found(name: str) -> None:
    """Every attention's output is read by the projection that the family's own name points at."""
    model = build(BY_NAME[name])
    anatomy = Anatomy.of(model)
    measures = metrics(anatomy, tokens(1, 40)[0])
    assert list(measures) == list(anatomy.attentions)
    for name, metric in measures.items():
        block = model.get_submodule(name.rpartition(".")[0])
        readers = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
        heads, width = metric.shape[:2]
        candidates = []
        for reader in readers:
            weight = reader.weight.T if isinstance(reader, nn.Linear) else reader.weight
            if len(weight) == heads * width:
                parts = weight.detach().unflatten(0, (heads, width))
                candidates.append(parts @ parts.mT)
        assert any(torch.allclose(metric, candidate, rtol=1e-4, atol=1e-6) for candidate in candidates)


def test_it_is_part_of_the_report() -> None:
    model = build(BY_NAME["llama"])
    report = str(rpb.retrofit(model, rpb.RetrofitConfig(), calibration=[tokens(2, 48, seed=5)]))
    assert "of the variance of the heads' outputs" in report
