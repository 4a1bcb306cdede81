"""lm-evaluation-harness scores and generates what the retrofit does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedModel

import rpb_retrofit as rpb
from tests.support.tiny_models import tables_of
from tests.support.training_cases import PROSE, small_tokenizer, write_retrofit, write_source

ROWS = [
    {"context": PROSE[a : a + 40 * n].strip(), "choices": ["is no", "or", PROSE[a : a + 20].strip()], "answer": n % 3}
    for n, a in enumerate((70, 340, 910, 1600, 2350), start=1)
]
TEXTS = [{"text": PROSE[a:b]} for a, b in ((0, 150), (500, 800), (2000, 2900))]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choose": (
        ROWS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "read": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        },
    ),
    "write": (
        ROWS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "nothing",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}
"""Rows of data and the rest of a task's YAML: one task for each kind of request."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, its retrofit, whose tables matter, and the tasks, whose data are files beside them."""
    base = tmp_path_factory.mktemp("harness")
    model = rpb.load(write_retrofit(write_source(base / "source"), base / "plain"))
    with torch.no_grad():
        for name in tables_of(model):
            model.get_parameter(name).normal_(0, 1)
    model.save_pretrained(base / "retrofit")
    small_tokenizer().save_pretrained(base / "retrofit")
    (base / "tasks").mkdir()
    for name, (rows, settings) in TASKS.items():
        data = base / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(base / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **settings}
        (base / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return base


def evaluated(base: Path, model: Any, **options: Any) -> dict[str, Any]:
    """The harness' answer for all tasks, at most three requests at once, so that they are padded."""
    tasks = TaskManager(include_path=str(base / "tasks"), include_defaults=False)
    settings = {"tasks": [*TASKS], "task_manager": tasks, "batch_size": 3, "device": "cpu", "bootstrap_iters": 0}
    result = lm_eval.simple_evaluate(model=model, **settings, **options)
    assert result is not None
    return result


def responses(result: dict[str, Any], task: str) -> list[list[Any]]:
    """By row, what the model answered to each of its requests."""
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [[answer for (answer,) in sample["resps"]] for sample in samples]


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, before: list[int], scored: list[int]) -> float:
    """Of the tokens ``scored`` after those ``before``, without a batch."""
    log_p = model(torch.tensor([before + scored])).logits[0].double().log_softmax(-1)
    return sum(log_p[len(before) + i - 1, token].item() for i, token in enumerate(scored))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where others use the cores, two threads make the many small passes of the harness twenty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("by", ["folder", "object"])
def test_evaluation_harness(by: str, harness: Path, one_thread: None) -> None:
    """Its `hf` model scores and generates what the retrofit does, also beyond the source's 256 positions."""
    retrofit, source = rpb.load(harness / "retrofit"), AutoModelForCausalLM.from_pretrained(harness / "source")
    tokenizer = small_tokenizer()
    # The harness cuts text at `max_position_embeddings`, which in a retrofit is only the source's: it must be told.
    if by == "folder":
        arguments = {"pretrained": str(harness / "retrofit"), "trust_remote_code": True, "max_length": 1024}
        result = evaluated(harness, "hf", model_args=arguments)
    else:
        result = evaluated(harness, HFLM(pretrained=retrofit, tokenizer=tokenizer, max_length=1024, batch_size=3))

    correct = []
    for row, answers in zip(ROWS, responses(result, "choose"), strict=True):
        before = tokenizer.encode(row["context"])
        by_hand = [log_likelihood(retrofit, before, tokenizer.encode(f" {choice}")) for choice in row["choices"]]
        assert [score for score, _ in answers] == pytest.approx(by_hand, abs=1e-3)
        correct.append(by_hand.index(max(by_hand)) == row["answer"])
    assert result["results"]["choose"]["acc,none"] == pytest.approx(sum(correct) / len(correct))

    lengths = []
    for row, (score,) in zip(TEXTS, responses(result, "read"), strict=True):
        ids = tokenizer.encode(row["text"])
        lengths.append(len(ids))
        assert score == pytest.approx(log_likelihood(retrofit, [tokenizer.bos_token_id], ids), rel=1e-5)
        assert score != pytest.approx(log_likelihood(source, [tokenizer.bos_token_id], ids), rel=1e-4)
    assert min(lengths) < 256 < max(lengths) < 1024

    for row, (text,) in zip(ROWS, responses(result, "write"), strict=True):
        ids = tokenizer(row["context"], return_tensors="pt").input_ids
        new = retrofit.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
