"""The source as it was, as far as a retrofit changes it: what `revert`, and a retrofit that fails, go back to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import on
from rpb_retrofit.runtime.families import TABLE, is_own
from rpb_retrofit.runtime.modeling import detach
from rpb_retrofit.runtime.tracing import has_values

SNAPSHOT = "_rpb_source"
"""Attribute of a model that was retrofitted in this process: its `Snapshot`."""

_WRITTEN = (
    *("rpb_retrofit", "auto_map", "attn_implementation", "experts_implementation", "architectures"),
    *("_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path"),
)
"""What a retrofit, or saving it, writes into a config."""

Fingerprint = tuple[torch.dtype, torch.Size, int]
"""Of a parameter: dtype, shape, and the sum of its bits read as integers."""


@dataclass
class Snapshot:
    """What a retrofitted model no longer holds.

    ``configs``: each config, and its attributes as they were. ``names``: each model, and where it was loaded from.
    ``own_tables``: T5's. ``fingerprints`` of the source's parameters, T5's tables aside; of folded ones, as folded.
    ``folded``: weights as they were before something was folded in.
    """

    anatomy: Anatomy
    configs: list[tuple[Any, dict[str, Any]]]
    names: list[tuple[PreTrainedModel, str | None]]
    own_tables: dict[str, nn.Module]
    fingerprints: dict[str, Fingerprint]
    folded: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, anatomy: Anatomy) -> Snapshot:
        """Of a plain model."""
        return cls(
            anatomy,
            configs=[(config, dict(vars(config))) for config in anatomy.configs],
            names=[(submodel, submodel.name_or_path) for submodel in anatomy.submodels],
            own_tables={
                n: getattr(module, TABLE) for n, module in anatomy.attentions.items() if hasattr(module, TABLE)
            },
            fingerprints=fingerprints(anatomy.model),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or pickled model has configs of its own, so it has no snapshot

    @contextmanager
    def or_restored(self) -> Iterator[None]:
        """Inside, the model is retrofitted; where that ends in an exception, of any kind, it is the source again."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Make the model the source again, however far its retrofit had come."""
        model = self.anatomy.model
        for name, weight in self.folded.items():
            model.get_parameter(name).data.copy_(weight)
        detach(self.anatomy)
        for name, table in self.own_tables.items():
            attention = self.anatomy.attentions[name]
            setattr(attention, TABLE, on(next(attention.parameters()).device, table))
            attention.has_relative_attention_bias = True
        for config, before in self.configs:  # what the retrofit wrote goes; what it replaced comes back
            for key in _WRITTEN:
                vars(config).pop(key, None)
                if key in before:
                    vars(config)[key] = before[key]
        for submodel, loaded_from in self.names:
            submodel.name_or_path = loaded_from
        vars(model).pop(SNAPSHOT, None)

    def take_folded_fingerprints(self) -> None:
        """From now on the folded weights are expected as they are."""
        self.fingerprints |= {name: _fingerprint(self.anatomy.model.get_parameter(name)) for name in self.folded}


def folded(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of a model that was retrofitted in this process: the weights that something was folded into, as they were."""
    snapshot: Snapshot = getattr(model, SNAPSHOT)
    return snapshot.folded


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """Of all parameters but the tables, the source's (T5's) and the retrofit's."""
    return {name: _fingerprint(parameter) for name, parameter in model.named_parameters() if not is_own(name)}


def _fingerprint(parameter: torch.Tensor) -> Fingerprint:
    if not has_values(parameter):
        return parameter.dtype, parameter.shape, 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
    return parameter.dtype, parameter.shape, int(bits.sum(dtype=torch.int64))
