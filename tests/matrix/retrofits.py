"""Retrofits of a real model, one of every sort that the tool makes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.gguf import load_gguf
from rpb_retrofit.demo.fetch import SMOLLM2, fetch
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text
from rpb_retrofit.training.recipe import Recipe, Stage
from rpb_retrofit.training.run import finetune
from tests.matrix.texts import text

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS, LENGTH = 2048, 1024
"""Of calibration: a quarter of the default; twice as many for the one in which faults are planted."""


@dataclass(frozen=True)
class Sort:
    """``settings`` of the retrofit, what it is made from, and the stage that is trained after it, of 20 steps."""

    settings: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    stage: Stage | None = None


STEPS, BATCH = 20, 128
"""Of training, and tokens of a step."""

SORTS: dict[str, Sort] = {
    "tables": Sort(),
    "tables+content": Sort({"calibrate": "tables+content"}),
    "kept 8": Sort({"keep_frequencies": 8}),
    "kept 16": Sort({"keep_frequencies": 16}),
    "kept auto": Sort(
        {"keep_frequencies": "auto", "relative_attention_num_buckets": 64, "relative_attention_max_distance": 2048}
    ),
    "log tail": Sort({"tail": "log"}),
    "unscaled": Sort({"scale": "unscaled"}),
    "shared": Sort({"shared": True}),
    "zeros": Sort({"init": "zeros"}),
    "normal": Sort({"init": "normal"}),
    "alibi": Sort({"init": "alibi"}),
    "from another": Sort({"init": "from:{}"}, start="kept 16"),
    "polished": Sort({"polish": STEPS}),
    "healed": Sort(start="tables", stage=Stage(train="all", tokens=STEPS * BATCH, rate=1e-4, lengths={BATCH: 1.0})),
    "LoRA merged": Sort(start="tables", stage=Stage(train="lora", tokens=STEPS * BATCH, lengths={BATCH: 1.0})),
}


def source(folder: Path, dtype: str) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint in this dtype, made where it is not there."""
    target = folder / f"source-{dtype}"
    with FileLock(f"{target}.lock"):  # two processes that share the work both want it first
        if not target.exists():
            model, tokenizer = load_gguf(fetch(SMOLLM2))
            with whole_folder(target) as part:
                model.to(DTYPES[dtype]).save_pretrained(part)
                tokenizer.save_pretrained(part)
    return target


def retrofit(folder: Path, sort: str, dtype: str, calibration: str) -> Path:
    """The retrofit of a sort, calibrated (and trained) on a text, made where it is not there."""
    made = SORTS[sort]
    target = folder / "-".join([sort.replace(" ", "-"), dtype, calibration])
    if target.exists():
        return target
    start = retrofit(folder, made.start, dtype, calibration) if made.start else None
    if made.stage is not None:
        return _trained(str(start), target, made.stage, calibration)
    settings = {key: value.format(start) if key == "init" else value for key, value in made.settings.items()}
    config = rpb.RetrofitConfig(**settings)
    words = None
    if config.takes_text or config.polish:
        tokens = 2 * TOKENS if sort == "tables" else TOKENS
        words = CalibrationText(Text(calibration, [text(calibration)]), tokens, LENGTH)
    retrofit_checkpoint(str(source(folder, dtype)), target, config, calibration=words)
    return target


def _trained(start: str, target: Path, stage: Stage, calibration: str) -> Path:
    data = target.with_suffix(".txt")
    data.write_text(text(calibration), encoding="utf-8")
    recipe = Recipe.model_validate(
        {"stages": [stage.model_dump()], "data": [{"name": str(data)}], "batch_tokens": BATCH, "trackers": []}
        | {"evaluate_tokens": 0, "save_every": 1000}
    )
    shutil.rmtree(target.with_name(f"{target.name}.run"), ignore_errors=True)
    finetune(start, target, recipe, say=lambda line: None)
    return target
