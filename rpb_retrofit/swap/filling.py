"""Filling the tables of an attached model: from a formula, from another checkpoint, or by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.runtime.families import TABLE, family_of
from rpb_retrofit.runtime.mechanisms import trained_context
from rpb_retrofit.runtime.modeling import table_names
from rpb_retrofit.tables import FROM, INITIALISATIONS
from rpb_retrofit.tables.calibrate import Calibration, CalibrationReport
from rpb_retrofit.tables.reuse import Reused, reuse, spread_heads
from rpb_retrofit.tables.table_spec import TableSpec


def first_tables(model: PreTrainedModel, config: RetrofitConfig) -> Reused:
    """What the tables of an attached model begin with, where they need no text, by the tables' names; on the CPU."""
    wanted = table_specs(model, config)
    if config.init.startswith(FROM):
        return spread_heads(reuse(config.init.removeprefix(FROM), wanted), wanted)
    return Reused({name: INITIALISATIONS[config.init](spec) for name, spec in wanted.items()}, [])


def table_specs(model: PreTrainedModel, config: RetrofitConfig) -> dict[str, TableSpec]:
    """What there is to know of each table of an attached model, by its name."""
    context = trained_context(model, family_of(model.config)) or 2 * config.relative_attention_max_distance
    hidden_size = model.config.get_text_config().hidden_size
    biases: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in table_names(model)}
    return {
        name: TableSpec(
            len(bias.weight), bias.bucketing, hidden_size, context, config.seed + number, tail=bias.tail is not None
        )
        for number, (name, bias) in enumerate(biases.items())
    }


def parameters_of(found: Reused, wanted: Mapping[str, TableSpec]) -> dict[str, torch.Tensor]:
    """The tables, and the tails where they are wanted, as parameters by name."""
    parameters = {}
    for name, start in found.starts.items():
        parameters[name] = start.table
        if (spec := wanted[name]).tail:
            none = torch.zeros(spec.heads, spec.bucketing.directions)
            parameters[name.replace(f"{TABLE}.weight", f"{TABLE}.tail")] = (
                none if start.slopes is None else start.slopes
            )
    return parameters


def fill(
    model: PreTrainedModel, config: RetrofitConfig, fitting: Calibration | None, attentions: Mapping[str, Any]
) -> tuple[CalibrationReport | None, list[str]]:
    """Fill the tables of an attached model; what calibration reached, and notes on what was converted."""
    if fitting is None:
        found = first_tables(model, config)
        for name, value in parameters_of(found, table_specs(model, config)).items():
            model.get_parameter(name).data.copy_(value)
        return None, found.notes
    if not config.init.startswith(FROM):
        return fitting.apply(model, attentions), []
    reused = reuse(config.init.removeprefix(FROM), table_specs(model, config))
    return fitting.apply(model, attentions, reused.starts), reused.notes
