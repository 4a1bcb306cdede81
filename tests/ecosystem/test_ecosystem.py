"""The tools around Transformers, unmodified: heads, pipelines, PEFT, Trainer, TRL, lm-evaluation-harness, the hub."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from trl import SFTConfig, SFTTrainer

import rpb_retrofit as rpb
from rpb_retrofit.runtime.modeling import FILE_LOCKS, LOCK, RUNTIME_FILES, submodels
from tests.families.cases import CASES, Case
from tests.support.hub_stub import Hub
from tests.support.tiny_models import (
    AUTO,
    CONFIG,
    VOCAB,
    build,
    closeness,
    inputs_of,
    retrofitted,
    saved_config,
    tokens,
)
from tests.support.training_cases import PROSE, small_tokenizer, write_retrofit, write_source

LLAMA, BERT, GPT2, T5 = (case for name in ("llama", "bert", "gpt2", "t5") for case in CASES if str(case) == name)
TABLE = "relative_attention_bias"


def tables(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if f"{TABLE}." in name}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 0
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(tokens()).logits


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


# --- Transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, BERT, GPT2, T5], ids=str)
def test_every_head(case: Case, tmp_path: Path) -> None:
    """A head finds in a retrofit what it would find in the source, and the tables besides."""
    build(case).save_pretrained(tmp_path / "source")
    model = retrofitted(case)
    model.save_pretrained(tmp_path / "out")
    heads, inputs = model.config.auto_map, inputs_of(case, tokens())
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True)
    want = states.get("encoder_hidden_states", states.get("hidden_states"))[1]
    assert AUTO[case.kind] in heads and "AutoModel" in heads and len(heads) >= 5
    for name, reference in heads.items():
        if reference == "modeling.RpbLlamaForQuestionAnswering":
            continue  # its weights have another prefix: Transformers finds none of them, in the source either
        auto = getattr(transformers, name)
        _, plain = auto.from_pretrained(tmp_path / "source", output_loading_info=True)
        loaded, info = rpb.load(tmp_path / "out", auto, output_loading_info=True)
        assert f"modeling.{type(loaded).__name__}" == reference
        assert set(info["missing_keys"]) == set(plain["missing_keys"]), name
        base, own = loaded.base_model.eval(), tables(model.base_model)
        assert tables(base) and all(torch.equal(values, own[table]) for table, values in tables(base).items())
        sides = inputs if base.config.is_encoder_decoder else {"input_ids": inputs["input_ids"]}
        with torch.no_grad():
            states = base(**sides, output_hidden_states=True)
        assert torch.equal(states.get("encoder_hidden_states", states.get("hidden_states"))[1], want), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", ["auto", {"model": "cpu", "lm_head": "disk"}])
def test_device_map(device_map: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = retrofitted(LLAMA)
    model.save_pretrained(tmp_path / "out")
    loaded = rpb.load(tmp_path / "out", device_map=device_map, dtype=dtype, offload_folder=tmp_path / "offload")
    assert loaded.lm_head.weight.is_meta == (device_map != "auto")
    assert loaded.dtype == dtype
    assert_same(tables(loaded), tables(model))
    assert closeness(logits(loaded).float(), logits(model)) < (1e-6 if dtype == torch.float32 else 0.05)


def test_pipelines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = retrofitted(LLAMA)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"max_new_tokens": 24, "do_sample": False, "return_tensors": True}
    prompts = ["w7 w8 w9 w10 w11", "w20 w21 w22"]
    by_object = pipeline("text-generation", model=model, tokenizer=tokenizer)
    by_folder = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(by_folder.model).__name__ == "RpbLlamaForCausalLM"
    for batch_size in (1, 2):
        for pipe in (by_object, by_folder):
            for prompt, answer in zip(prompts, pipe(prompts, batch_size=batch_size, **settings), strict=True):
                ids = tokenizer(prompt, return_tensors="pt").input_ids
                want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
                assert answer[0]["generated_token_ids"][-24:] == want[0, -24:].tolist()


# --- PEFT ----------------------------------------------------------------------------------------------------------


def train(model: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("with_tables", [False, True])
def test_peft(with_tables: bool, tmp_path: Path) -> None:
    base = retrofitted(LLAMA)
    base.save_pretrained(tmp_path / "base")
    before, plain = tables(base), logits(base)
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=[TABLE] if with_tables else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    train(model)
    trained = logits(model)
    assert closeness(trained, plain) > 1e-2
    model.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(rpb.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)

    merged = again.merge_and_unload()
    assert type(merged).__name__ == "RpbLlamaForCausalLM"
    assert closeness(logits(merged), trained) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    loaded = rpb.load(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    assert tables(loaded).keys() == before.keys()
    for name, values in tables(loaded).items():
        assert torch.equal(values, before[name]) != with_tables, name


@pytest.mark.parametrize("with_tables", [False, True])
def test_an_adapter_does_not_name_the_source(with_tables: bool, tmp_path: Path) -> None:
    """Whoever loads an adapter of a model that was retrofitted in place gets the retrofit or an error that says how."""
    build(LLAMA).save_pretrained(tmp_path / "source")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    rpb.retrofit(base, CONFIG)
    source = str(tmp_path / "source")
    assert base.config.rpb_retrofit["source"] == source
    assert all(source not in (m.name_or_path, m.config.name_or_path) for m in submodels(base))
    saved = copy.deepcopy(base)
    saved.save_pretrained(tmp_path / "base")

    def adapter(base: Any, name: str) -> Tensor:
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj"], modules_to_save=[TABLE] if with_tables else None)
        model = get_peft_model(base, LoraConfig(**{**lora.to_dict(), "task_type": "CAUSAL_LM"}))
        train(model)
        model.save_pretrained(tmp_path / name)
        for file in ("adapter_config.json", "README.md"):
            assert source not in (tmp_path / name / file).read_text()
        return logits(model)

    adapter(base, "of memory")
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"retrofit in memory. Save it, load it with rpb_retrofit\.load"):
            auto.from_pretrained(tmp_path / "of memory")
    wanted = adapter(saved, "of a folder")
    with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\)"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "of a folder")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "of a folder", trust_remote_code=True)
    assert torch.equal(logits(loaded), wanted)


def test_names_come_back_with_the_source(tmp_path: Path) -> None:
    build(T5).save_pretrained(tmp_path)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)

    def names() -> list[tuple[str, str]]:
        return [(m.name_or_path, m.config.name_or_path) for m in submodels(model)]

    before = names()
    rpb.retrofit(model, CONFIG)
    assert all(str(tmp_path) not in pair for pair in names())
    rpb.revert(model)
    assert names() == before and (str(tmp_path),) * 2 in before


# --- Trainer and TRL -----------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def transformers_trainer(model: Any, folder: Path, tokenizer: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **RECIPE), train_dataset=rows)


def trl_trainer(model: Any, folder: Path, tokenizer: Any) -> Trainer:
    rows = Dataset.from_dict({"text": [tokenizer.decode(row) for row in tokens(8)]})
    return SFTTrainer(
        model=model, args=SFTConfig(output_dir=str(folder), **RECIPE), train_dataset=rows, processing_class=tokenizer
    )


@pytest.mark.parametrize("make", [transformers_trainer, trl_trainer])
@pytest.mark.parametrize("shared", [False, True])
def test_trainers(make: Any, shared: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tables and weights train; an interrupted run continues to where an uninterrupted one ends."""

    def model() -> PreTrainedModel:
        model = build(LLAMA)
        rpb.retrofit(model, rpb.RetrofitConfig(init="zeros", shared=shared))
        return model

    trainer = make(model(), tmp_path / "run", tokenizer)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    trained = trainer.model
    for name, parameter in trained.named_parameters():
        assert not torch.equal(parameter, start[name]), name

    loaded = rpb.load(tmp_path / "run" / "checkpoint-4")
    assert len(tables(loaded)) == (1 if shared else 2)
    assert_same(tables(loaded), tables(trained))
    assert closeness(logits(loaded), logits(trained)) < 1e-6
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4", trust_remote_code=True)
    assert closeness(logits(saved), logits(trained)) < 1e-6

    resumed = make(model(), tmp_path / "run", tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(dict(resumed.model.named_parameters()), dict(trained.named_parameters()))


# --- lm-evaluation-harness -----------------------------------------------------------------------------------------

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
        for name in tables(model):
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
    found = lm_eval.simple_evaluate(model=model, **settings, **options)
    assert found is not None
    return found


def responses(found: dict[str, Any], task: str) -> list[list[Any]]:
    """By row, what the model answered to each of its requests."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
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
        found = evaluated(harness, "hf", model_args=arguments)
    else:
        found = evaluated(harness, HFLM(pretrained=retrofit, tokenizer=tokenizer, max_length=1024, batch_size=3))

    correct = []
    for row, answers in zip(ROWS, responses(found, "choose"), strict=True):
        before = tokenizer.encode(row["context"])
        by_hand = [log_likelihood(retrofit, before, tokenizer.encode(f" {choice}")) for choice in row["choices"]]
        assert [score for score, _ in answers] == pytest.approx(by_hand, abs=1e-3)
        correct.append(by_hand.index(max(by_hand)) == row["answer"])
    assert found["results"]["choose"]["acc,none"] == pytest.approx(sum(correct) / len(correct))

    lengths = []
    for row, (score,) in zip(TEXTS, responses(found, "read"), strict=True):
        ids = tokenizer.encode(row["text"])
        lengths.append(len(ids))
        assert score == pytest.approx(log_likelihood(retrofit, [tokenizer.bos_token_id], ids), rel=1e-5)
        assert score != pytest.approx(log_likelihood(source, [tokenizer.bos_token_id], ids), rel=1e-4)
    assert min(lengths) < 256 < max(lengths) < 1024

    for row, (text,) in zip(ROWS, responses(found, "write"), strict=True):
        ids = tokenizer(row["context"], return_tensors="pt").input_ids
        new = retrofit.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


# --- the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that speaks as much of the hub's protocol as an upload needs: its address, and where the files go."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path / "hub"
    server.folder.mkdir()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.folder
    server.shutdown()
    server.server_close()


def test_push_to_hub(hub: tuple[str, Path], tmp_path: Path) -> None:
    address, uploaded = hub
    model = retrofitted(LLAMA)
    model.save_pretrained(tmp_path / "out")
    script = "import sys, rpb_retrofit as rpb; rpb.load(sys.argv[1]).push_to_hub('someone/retrofit')"
    environment = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_stub",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", *RUNTIME_FILES} <= {path.name for path in uploaded.iterdir()}
    assert all(saved_config(uploaded)[name] == LOCK for name in ("attn_implementation", *FILE_LOCKS))
    assert torch.equal(logits(rpb.load(uploaded)), logits(model))
    for name in RUNTIME_FILES:
        assert (uploaded / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
