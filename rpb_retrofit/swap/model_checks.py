"""What a model must be, and which text must be given, to be retrofitted in memory: checked before anything changes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError, UnsupportedModelError
from rpb_retrofit.files.finite import check_finite
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.tracing import has_values
from rpb_retrofit.swap.eligibility import check_eligible
from rpb_retrofit.tables import CALIBRATED, FROM, INITIALISATIONS


def check_model(model: PreTrainedModel, config: RetrofitConfig, reads_text: bool) -> Anatomy:
    """The anatomy of a model that can be retrofitted with these settings, ``reads_text``: on text that was given.

    Raises what `rpb_retrofit.retrofit` raises.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a Transformers model: retrofit first, then wrap it")
    name = model.name_or_path or type(model).__name__
    anatomy = Anatomy(model, check_eligible(model.config.to_dict(), name))
    if config.init == CALIBRATED and anatomy.family.mechanism == "t5":
        raise ConfigError(
            f"init='calibrated': '{name}' has T5's tables already, nothing is to be fitted; take them over with "
            f"init='{FROM}{model.name_or_path or 'CHECKPOINT'}'"
        )
    assert anatomy.attentions, "there are some, or PartialMatchError says so"
    _check_values(model, needed=config.changes_weights or reads_text or config.polish > 0)
    check_finite({key: p for key, p in model.named_parameters() if has_values(p)}, name)
    return anatomy


def check_text(config: RetrofitConfig, calibration: Any | None, polishing: Any | None) -> None:
    """ConfigError where text is missing that the settings ask for, or given that they do not use."""
    if calibration is None and config.init == CALIBRATED:
        raise ConfigError(
            "init='calibrated' needs text: give calibration=[batches of token ids], or choose another init: "
            f"{', '.join(INITIALISATIONS)}"
        )
    if calibration is not None and not config.takes_text:
        raise ConfigError(f"calibration was given, but init='{config.init}' uses none: leave it out")
    if polishing is not None and not config.polish:
        raise ConfigError("polishing was given, but polish=0 uses none: leave it out")
    if config.polish and calibration is None and polishing is None:
        raise ConfigError(f"polish={config.polish} needs text: give polishing=[batches of token ids]")


def _check_values(model: nn.Module, needed: bool) -> None:
    """UnsupportedModelError where parameters are elsewhere, in pieces, or (``needed``) without values."""
    parameters = dict(model.named_parameters())
    if (name := sharded(model)) is not None:
        raise UnsupportedModelError(
            f"{name} is sharded (by FSDP2, tensor parallelism or DeepSpeed's ZeRO-3): retrofit, then shard"
        )
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if 0 < len(meta) < len(parameters):
        raise UnsupportedModelError(f"{len(meta)} parameters are offloaded ({meta[0]}, ...): retrofit, then dispatch")
    without = [name for name, parameter in parameters.items() if not has_values(parameter)]
    if without and needed:
        where = "on the meta device" if meta else "a fake tensor"
        raise UnsupportedModelError(f"{without[0]} is {where}, without a value to go by: load the weights")


def sharded(model: nn.Module) -> str | None:
    """The first parameter of which this process holds a piece, or None."""
    pieces = (name for name, p in model.named_parameters() if isinstance(p, DTensor) or hasattr(p, "ds_id"))
    return next(pieces, None)
