"""Fetch, retrofit in two ways, evaluate, generate, report."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.demo.fetch import SMOLLM2, fetch
from rpb_retrofit.demo.report import write_report
from rpb_retrofit.evaluation.nll import LengthResult, Windows, nll_at_length
from rpb_retrofit.evaluation.plots import bias_by_offset, loss_by_position, save
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.swap.report import RetrofitReport
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.text import CalibrationText, Text, bos_policy, read_text, tokenise

LENGTHS = (128, 512, 2048)
TOKENS = 2048
BEGINNINGS = ("Water boils at a temperature of", "Once upon a time, a young farmer found")
NEW_TOKENS = 40


KINDS: dict[str, dict[str, Any]] = {
    "T5 bias": {"calibrate": CONTENT},
    "T5 bias + high frequencies": {"keep_frequencies": "auto"},
}
"""The retrofits that are shown, and their settings."""


@dataclass(frozen=True)
class Variant:
    """One model's measurements; ``folder`` beside the report holds it, the source's none."""

    name: str
    folder: str | None
    report: RetrofitReport | None
    results: list[LengthResult]
    continuations: list[str]


@dataclass(frozen=True)
class Demo:
    """All that the report shows. ``seconds`` is the wall time by step."""

    source: str
    text: str
    policy: str
    arms: list[Variant]
    seconds: dict[str, float]
    new_tokens: int = NEW_TOKENS

    @property
    def costs(self) -> dict[str, list[float]]:
        """Loss of each retrofit above its source, in nats, by length."""
        source, *retrofits = self.arms
        return {
            arm.name: [b.nll - a.nll for a, b in zip(source.results, arm.results, strict=True)] for arm in retrofits
        }


def run_demo(out: Path, config: RetrofitConfig, say: Callable[[str], None]) -> Demo:
    """Run the whole demo into a new folder ``out``: the retrofits, report.html, its pictures, report.json.

    The first half of the text is for evaluation, the second for calibration.
    """
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
        whole = read_text(None)
        (prose,) = whole.documents
        tested, taught = prose[: len(prose) // 2], prose[len(prose) // 2 :]
        calibration = CalibrationText(Text(f"the second half of {whole.name}", [taught]))
        arms: list[Variant] = []
        for name in ("source (RoPE)", *KINDS):
            target, report = folder / re.sub(r"\W+", "-", name), None
            if name in KINDS:
                with step(f"retrofit: {name}"):
                    kind = replace(config, **KINDS[name])
                    report = retrofit_checkpoint(str(gguf), target, kind, calibration=calibration).report
            with step(f"load: {name}"):
                model, tokenizer = open_causal_lm(str(gguf if report is None else target))
                documents, bos = tokenise(tokenizer, [tested]), bos_policy(tokenizer, "auto")
            with step(f"evaluate: {name}"):
                results = _evaluate(model, documents, bos, name)
            with step(f"generate: {name}"):
                continuations = [_continue(model, tokenizer, beginning) for beginning in BEGINNINGS]
            arms.append(Variant(name, None if report is None else target.name, report, results, continuations))
            if report is not None:
                save(bias_by_offset(model), folder / f"bias-of-{target.name}.png")
        policy = "no BOS" if bos is None else "BOS first in every window"
        save(loss_by_position({arm.name: arm.results for arm in arms}), folder / "loss_by_position.png")
        demo = Demo("SmolLM2-135M-Instruct (4-bit weights, dequantised)", whole.name, policy, arms, seconds)
        write_report(demo, BEGINNINGS, folder)
        (folder / "report.json").write_text(json_text({**asdict(demo), "costs": demo.costs}))
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
