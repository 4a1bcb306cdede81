"""The recipe of a fine-tune: one validated document, from YAML and the command line, saved beside what it made."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from rpb_retrofit.config import parse_count
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.small_file import read_small
from rpb_retrofit.text.repeats import MOST
from rpb_retrofit.training.yaml_text import LARGEST, read_yaml


def _count(value: Any) -> Any:
    """``5M`` as a number; what is no text as it is."""
    return value if not isinstance(value, str) or (count := parse_count(value)) is None else count


Positive = Annotated[int, Field(gt=0)]
Tokens = Annotated[int, BeforeValidator(_count), Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Data(_Settings):
    """One source of text: a file (text, JSONL, Parquet) or a dataset of the hub, and its share of the tokens."""

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    split: str = "train"
    subset: str | None = None
    column: str = "text"
    streaming: bool = False


class Stage(_Settings):
    """A part of the run in which the same parameters are trained.

    ``train``: ``tables`` (with tails and factors, and nothing else), ``lora`` (the tables, and low-rank updates of all
    linear layers, merged at the end), ``attention`` (each attention by itself, so that it hands on what the source's
    does; tables and weights) or ``all``. ``tokens``: the budget, all processes together. ``rate`` is the peak
    learning rate of the weights or their low-rank updates, ``table_rate`` that of the tables. ``lengths``: tokens of a
    sequence to its weight; each step draws one, so that far buckets get gradients too. ``warmup``: share of the steps
    in which the rates rise to their peak.
    """

    train: Literal["tables", "lora", "attention", "all"] = "all"
    tokens: Tokens
    rate: Rate = 2e-4
    table_rate: Rate = 1e-2
    lengths: dict[Annotated[int, Field(ge=2)], Rate] = Field(default={512: 1.0}, min_length=1)
    warmup: Share = 0.1
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    lora_rank: Positive = 16


class Recipe(_Settings):
    """Everything that a run depends on, but the model.

    ``objective``: ``distillation`` (the source's next-token distribution; its hidden states, layer by layer, for a
    model without a language head), ``next-token`` or ``masked`` (encoders). ``distillation_share``: what distillation
    counts where the objective is ``distillation``; the rest is the next token. ``relations``: what the divergence of
    each head's attention from the source's counts beside it, in nats a token (the mean over layers and heads).
    ``batch_tokens``: tokens of an optimizer step, all processes together; ``micro_tokens``: of one pass of one process
    (None: all of its share at once). ``on_bad_step``: what happens where loss or gradients are not finite, or the loss
    is more than ``spike`` nats above the mean of the last 20 steps: ``stop``, or ``skip`` the step. ``held_out``: a
    file to evaluate on; without it ``held_out_share`` of the training text is kept apart. ``repeats``: the share of the
    training tokens, at most a half, that are planted as spans which come again below: a model that is trained on
    natural text no longer finds what stands far above. Where the text itself is learned (``next-token``, ``masked``, a
    ``distillation_share`` below 1) all spans are of the text; else half of them are random tokens.
    """

    stages: list[Stage] = Field(default=[Stage(train="tables", tokens=10_240), Stage(tokens=40_960)], min_length=1)
    data: list[Data] = []
    repeats: Annotated[float, Field(ge=0, le=MOST)] = 0.0
    objective: Literal["distillation", "next-token", "masked"] = "distillation"
    distillation_share: Share = 1.0
    relations: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    batch_tokens: Tokens = 512
    micro_tokens: Tokens | None = None
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip: Rate = 1.0
    dropout: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    save_every: Positive = 50
    keep: Positive = 2
    evaluate_every: Positive = 50
    evaluate_tokens: Annotated[int, Field(ge=0)] = 4096
    held_out: str | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    on_bad_step: Literal["stop", "skip"] = "stop"
    spike: Rate | None = 5.0
    trackers: list[str] = ["tensorboard"]

    @field_validator("precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # what YAML makes of it

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        for stage in self.stages:
            if (longest := max(stage.lengths)) > self.batch_tokens:
                raise ValueError(f"batch_tokens={self.batch_tokens} holds no sequence of {longest} tokens: raise it")
        if self.relations and self.objective != "distillation":
            raise ValueError(f"relations={self.relations} needs objective=distillation, not {self.objective}")
        if any(stage.train == "attention" for stage in self.stages):
            if self.objective != "distillation":
                raise ValueError(f"train=attention needs objective=distillation, not {self.objective}")
            if self.compile:
                raise ValueError("train=attention and compile=True: attention is not handed out of a graph")
        if self.relations and self.compile:
            raise ValueError(f"relations={self.relations} and compile=True: attention is not handed out of a graph")
        return self

    @property
    def tokens(self) -> int:
        """The budget of all stages."""
        return sum(stage.tokens for stage in self.stages)

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def read_recipe(file: Path | None, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file and changes on top, whose keys are dotted: ``stages.0.tokens``.

    Raises ConfigError, which names the key, its value and what was expected.
    """
    settings: Any = {}
    if file is not None:
        try:
            text = read_small(file, LARGEST)
        except ValueError as error:
            raise ConfigError(f"recipe '{file}' cannot be read: {error}") from error
        settings = read_yaml(text, f"recipe '{file}'") or {}
        if not isinstance(settings, dict):
            raise ConfigError(f"recipe '{file}' holds a {type(settings).__name__}, not keys with values")
    for key, value in (changes or {}).items():
        _put(settings, key, value)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"recipe{'' if file is None else f' {file}'}: {_explain(error)}") from None


def _put(settings: Any, key: str, value: Any) -> None:
    """Set a dotted key. Numbers index a list, which starts as the default one where there is none yet."""
    *path, last = key.split(".")
    at = settings
    for part in path:
        if isinstance(at, dict) and part not in at and part in Recipe.model_fields:
            at[part] = Recipe().model_dump()[part]
        at = _step(at, part, key)
    if isinstance(at, list):
        _step(at, last, key)
        at[int(last)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise ConfigError(f"recipe: there is no '{key}'")


def _step(at: Any, part: str, key: str) -> Any:
    try:
        return at[int(part)] if isinstance(at, list) else at[part]
    except (KeyError, IndexError, ValueError, TypeError):
        raise ConfigError(f"recipe: there is no '{key}' (nothing at '{part}')") from None


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first, *rest = error.errors()
    path = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        message = f"unknown key '{path}': " + (f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}")
    elif not path:
        message = first["msg"].removeprefix("Value error, ")
    else:
        message = f"{path}={reprlib.repr(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return message + (f" (and {len(rest)} more)" if rest else "")


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    inner: dict[str, type[BaseModel]] = {"stages": Stage, "data": Data}
    return list((inner.get(str(path[0]), Recipe) if len(path) > 1 else Recipe).model_fields)
