"""All that hangs on a model besides its numbers, to tell whether something was left behind."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.runtime.anatomy import Anatomy


def module_state(model: PreTrainedModel) -> list[Any]:
    """Everything that hangs on a model's modules and configs, parameters and buffers aside."""
    modules = [{key: _shown(value) for key, value in vars(module).items()} for module in model.modules()]
    configs = [dict(vars(config)) for config in Anatomy.of(model).configs]
    return [modules, [{key: str(value) for key, value in config.items()} for config in configs]]


def _shown(value: Any) -> Any:
    """A value that can be compared; of an object, which one it is."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):  # names of tied weights
        return dict(value)
    return value if isinstance(value, bool | int | str | float) else id(value)
