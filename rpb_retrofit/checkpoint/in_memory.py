"""A checkpoint's model, retrofitted in memory: with its weights, or without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from rpb_retrofit.checkpoint.load import on_gpu, open_tokenizer, open_weights
from rpb_retrofit.checkpoint.rewrite import Change
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.files.source import Source, model_class
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import own_names
from rpb_retrofit.swap.filling import first_tables, parameters_of, table_specs
from rpb_retrofit.swap.inplace import retrofit
from rpb_retrofit.swap.report import RetrofitReport
from rpb_retrofit.swap.snapshot import folded
from rpb_retrofit.tables.checksums import record
from rpb_retrofit.text.calibration_text import CalibrationText

Measure = Callable[[PreTrainedModel, Any], Any]
"""Of a model and its tokenizer, whatever is to be compared between a source and its retrofit."""


@dataclass(frozen=True)
class InMemory:
    """A model that was retrofitted in memory: its tables by name, weights that changed, and what was measured."""

    model: PreTrainedModel
    report: RetrofitReport
    tables: dict[str, Tensor]
    changes: dict[str, Change]
    measured: tuple[Any, Any] | None = None


def loaded(
    source: Source,
    settings: PreTrainedConfig,
    config: RetrofitConfig,
    calibration: CalibrationText | None,
    measure: Measure | None,
) -> InMemory:
    """With the source's weights in memory, which text is read with or which change."""
    model = on_gpu(open_weights(source, model_class(settings).from_pretrained))
    tokenizer = None if calibration is None else open_tokenizer(source)
    report, measured = retrofit_measured(model, tokenizer, config, calibration, measure)
    tables = {name: model.get_parameter(name).detach().cpu() for name in own_names(model)}
    changes = {name: Change(before, model.get_parameter(name)) for name, before in folded(model).items()}
    return InMemory(model, report, tables, changes, measured)


def unloaded(settings: PreTrainedConfig, config: RetrofitConfig) -> InMemory:
    """Without any weights: tables that a formula gives, or another checkpoint."""
    with torch.device("meta"), no_init_weights():
        model = model_class(settings)(settings)
    report = retrofit(model, config)
    anatomy = Anatomy.of(model)
    tables = parameters_of(first_tables(anatomy, config), table_specs(anatomy, config))
    record(model, tables)
    return InMemory(model, report, tables, {})


def retrofit_measured(
    model: PreTrainedModel,
    tokenizer: Any,
    config: RetrofitConfig,
    text: CalibrationText | None,
    measure: Measure | None,
) -> tuple[RetrofitReport, tuple[Any, Any] | None]:
    """Retrofit a loaded model on windows of a text, and measure it before and after; without a text, neither."""
    if text is None:
        return retrofit(model, config), None
    context = Anatomy.of(model).context
    windows = text.windows(tokenizer, context) if config.takes_text else None
    polishing = text.polishing(tokenizer, context, config.polish) if config.polish else None
    before = None if measure is None else measure(model, tokenizer)
    report = retrofit(model, config, windows, polishing)
    return report, None if measure is None else (before, measure(model, tokenizer))
