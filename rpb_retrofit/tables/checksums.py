"""Checksums of tables as they were written: they tell whether anything happened to the numbers since.

What writes tables, a retrofit or `rpb finetune`, keeps them in the config under ``table_checksums``; a diagnosis reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.files.digest import digest_of
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.modeling import submodels, table_names

KEY = "table_checksums"
DIGITS = 16


def checksum(table: Tensor, max_distance: int) -> str:
    """Of a table's numbers as float32, wherever it lies, and of the maximum distance that its buckets were made for."""
    numbers = table.detach().to("cpu", torch.float32).contiguous()
    return digest_of([numbers.numpy().tobytes(), str(max_distance).encode()])[:DIGITS]


def checksums(table: Tensor, bucketing: Bucketing) -> str:
    """Of all of a table (heads, buckets), and of it without the first and the last bucket of each direction: what was
    moved by a bucket has lost one."""
    inner = torch.cat([part[:, 1:-1] for part in table.split(bucketing.per_direction, 1)], 1)
    return f"{checksum(table, bucketing.max_distance)}-{checksum(inner, bucketing.max_distance)}"


def record(model: PreTrainedModel, tables: Mapping[str, Tensor] | None = None) -> None:
    """Write into a retrofit's config what its tables are now, or what ``tables`` (of one on the meta device) will be; a
    plain model has none."""
    if getattr(model.config, "rpb_retrofit", None) is None:
        return
    found = {}
    for name in table_names(model):
        bias: Any = model.get_submodule(name.removesuffix(".weight"))
        table = bias.weight if tables is None else tables[name]
        if not table.is_meta:
            found[name] = checksums(table, bias.bucketing)
    before: Mapping[str, Any] = model.config.rpb_retrofit
    settings = {**before, KEY: found} if found else before
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = settings
