"""Fetch, retrofit, evaluate, generate, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.folder import whole_folder
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.demo.fetch import SMOLLM2, fetch
from rpb_retrofit.demo.report import write_report
from rpb_retrofit.evaluation.nll import LengthResult, Windows, nll_at_length
from rpb_retrofit.evaluation.plots import bias_by_offset, loss_by_position, save
from rpb_retrofit.inplace import RetrofitReport
from rpb_retrofit.text import bos_policy, read_text, tokenise

LENGTHS = (128, 512, 2048)
TOKENS = 2048
BEGINNINGS = ("Water boils at a temperature of", "Once upon a time, a young farmer found")
NEW_TOKENS = 40


@dataclass(frozen=True)
class Arm:
    """One model's measurements."""

    name: str
    results: list[LengthResult]
    continuations: list[str]


@dataclass(frozen=True)
class Demo:
    """All that the report shows. ``seconds`` is the wall time by step."""

    source: str
    text: str
    policy: str
    report: RetrofitReport
    arms: list[Arm]
    seconds: dict[str, float]
    new_tokens: int = NEW_TOKENS

    @property
    def cost(self) -> list[float]:
        """Loss of the retrofit above its source, in nats, by length."""
        source, retrofit = self.arms
        return [b.nll - a.nll for a, b in zip(source.results, retrofit.results, strict=True)]


def run_demo(out: Path, config: RetrofitConfig, say: Callable[[str], None]) -> Demo:
    """Run the whole demo into a new folder ``out``: the retrofit, its report.html, two pictures, report.json."""
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        say(f"{name} ...")
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with whole_folder(out) as folder:
        with step("fetch SmolLM2-135M-Instruct"):
            gguf = fetch(SMOLLM2)
        with step("retrofit"):
            done = retrofit_checkpoint(str(gguf), folder / "retrofit", config)
        text = read_text(None)
        arms: list[Arm] = []
        for name, path in (("source (RoPE)", gguf), ("retrofit (T5 bias)", folder / "retrofit")):
            with step(f"load the {name}"):
                model, tokenizer = open_causal_lm(str(path))
                documents, bos = tokenise(tokenizer, text.documents), bos_policy(tokenizer, "auto")
            with step(f"evaluate the {name}"):
                results = _evaluate(model, documents, bos, name)
            with step(f"generate with the {name}"):
                continuations = [_continue(model, tokenizer, beginning) for beginning in BEGINNINGS]
            arms.append(Arm(name, results, continuations))
        policy = "no BOS" if bos is None else "BOS first in every window"
        save(loss_by_position({arm.name: arm.results for arm in arms}), folder / "loss_by_position.png")
        save(bias_by_offset(model), folder / "bias_by_offset.png")
        demo = Demo("SmolLM2-135M-Instruct (4-bit weights, dequantised)", text.name, policy, done.report, arms, seconds)
        write_report(demo, BEGINNINGS, folder)
        (folder / "report.json").write_text(json.dumps({**asdict(demo), "cost": demo.cost}, indent=2) + "\n")
    return demo


def _evaluate(
    model: PreTrainedModel, documents: Sequence[torch.Tensor], bos: int | None, name: str
) -> list[LengthResult]:
    return [
        nll_at_length(
            model, documents, Windows(length, length - (bos is not None), bos), TOKENS, f"{name}, windows of "
        )
        for length in LENGTHS
    ]


def _continue(model: Any, tokenizer: Any, beginning: str) -> str:
    inputs = tokenizer(beginning, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
