"""A table of absolute positions stretched to the target: between two of its vectors, their mean by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from rpb_retrofit.comparison.arm import Arm, Situation
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy, unused_rows


def _stretch(model: PreTrainedModel, situation: Situation) -> str:
    family = situation.family
    if family.mechanism not in ("learned", "sinusoidal"):
        raise ConfigError(f"the source's positions ({family.mechanism}) are no table of vectors to interpolate")
    rows = int(situation.number or situation.target)
    if rows <= situation.context:
        raise ConfigError(f"a table of {situation.context} positions holds {rows} already: there is nothing to stretch")
    for name, table in Anatomy.of(model).position_modules.items():
        unused = unused_rows(table)
        before = table.weight.detach()
        stretched = interpolate(before[unused:].T[None].double(), size=rows, mode="linear", align_corners=True)
        weight = torch.cat([before[:unused], stretched[0].T.to(before.dtype)])
        table.weight = torch.nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(weight)
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, "position_ids"):  # buffers as long as the table
            parent.position_ids = torch.arange(rows, device=weight.device)[None]
        if hasattr(parent, "token_type_ids"):
            parent.token_type_ids = parent.position_ids * 0
    model.config.max_position_embeddings = rows
    return f"the position table interpolated linearly from {situation.context} to {rows} vectors"


ARM = Arm("interpolated", "the table of absolute positions stretched to the target", _stretch, number="positions")
