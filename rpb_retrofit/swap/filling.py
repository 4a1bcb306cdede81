"""Filling the tables of an attached model: from a formula, from another checkpoint, or by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import table_names
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.tables import FROM, INITIALISATIONS
from rpb_retrofit.tables.calibrate import Calibration, CalibrationReport
from rpb_retrofit.tables.reuse import Reused, reuse, spread_heads
from rpb_retrofit.tables.table_spec import TableSpec


def first_tables(anatomy: Anatomy, config: RetrofitConfig) -> Reused:
    """What the tables of an attached model begin with, where they need no text, by the tables' names; on the CPU."""
    wanted = table_specs(anatomy, config)
    if config.init.startswith(FROM):
        return spread_heads(reuse(config.init.removeprefix(FROM), wanted), wanted)
    return Reused({name: INITIALISATIONS[config.init](spec) for name, spec in wanted.items()}, [])


def table_specs(anatomy: Anatomy, config: RetrofitConfig) -> dict[str, TableSpec]:
    """What there is to know of each table of an attached model, by its name."""
    model, context = anatomy.model, anatomy.context or 2 * config.relative_attention_max_distance
    hidden_size = model.config.get_text_config().hidden_size
    biases: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in table_names(model)}
    return {
        name: TableSpec(
            len(bias.weight), bias.bucketing, hidden_size, context, config.seed + number, tail=bias.tail is not None
        )
        for number, (name, bias) in enumerate(biases.items())
    }


def parameters_of(reused: Reused, wanted: Mapping[str, TableSpec]) -> dict[str, torch.Tensor]:
    """The tables, and the tails where they are wanted, as parameters by name."""
    parameters = {}
    for name, start in reused.starts.items():
        parameters[name] = start.table
        if (spec := wanted[name]).tail:
            none = torch.zeros(spec.heads, spec.bucketing.directions)
            parameters[name.replace(f"{TABLE}.weight", f"{TABLE}.tail")] = (
                none if start.slopes is None else start.slopes
            )
    return parameters


def fill(
    anatomy: Anatomy, config: RetrofitConfig, calibration: Calibration | None
) -> tuple[CalibrationReport | None, list[str]]:
    """Fill the tables of an attached model; what calibration reached, and notes on what was converted."""
    if calibration is None:
        first = first_tables(anatomy, config)
        for name, value in parameters_of(first, table_specs(anatomy, config)).items():
            anatomy.model.get_parameter(name).data.copy_(value)
        return None, first.notes
    if not config.init.startswith(FROM):
        return calibration.apply(), []
    reused = reuse(config.init.removeprefix(FROM), table_specs(anatomy, config))
    return calibration.apply(reused.starts), reused.notes
