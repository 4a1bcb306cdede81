"""Retrofitting a model in memory, and going back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.eligibility import check_eligible
from rpb_retrofit.errors import ConfigError, NotRetrofittedError, RevertError, UnsupportedModelError
from rpb_retrofit.runtime.families import family_of
from rpb_retrofit.runtime.interface import TABLE
from rpb_retrofit.runtime.modeling import attach, attention_modules, detach, table_names
from rpb_retrofit.tables import INITIALISATIONS
from rpb_retrofit.version import __version__

_SNAPSHOT = "_rpb_source"


@dataclass(frozen=True)
class RetrofitReport:
    """What a retrofit did: to which mechanism, in which layers, at how many parameters."""

    mechanism: str
    layers_expected: int
    layers_patched: list[str]
    tables: list[str]
    parameters_added: int
    num_buckets: int
    max_distance: int
    init: str

    def __str__(self) -> str:
        return (
            f"{self.mechanism} -> T5 bias: {len(self.layers_patched)} of {self.layers_expected} layers patched, "
            f"{len(self.tables)} tables of {self.num_buckets} buckets to distance {self.max_distance} "
            f"(init {self.init}), {self.parameters_added:,} parameters added"
        )


@dataclass
class _Snapshot:
    """What `revert` needs and the retrofitted model no longer holds."""

    attn_implementations: dict[int, Any]
    experts_implementation: Any
    architectures: list[str] | None
    own_tables: dict[str, nn.Module]  # T5's
    versions: dict[str, int]  # of the source's parameters: in-place changes raise them

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # versions start anew in a copied or pickled model, so it has no snapshot


def retrofit(
    model: PreTrainedModel, config: RetrofitConfig | None = None, calibration: Any | None = None
) -> RetrofitReport:
    """Swap the positional mechanism of ``model`` for the T5 bucketed bias, in place.

    No weight of the source changes; `revert` gives it back bit for bit. ``save_pretrained`` then writes a checkpoint
    that loads with `rpb_retrofit.load` or, without this package, with ``trust_remote_code=True``.

    Args:
        model: any model whose family has a row in ``runtime/families.py``, on any device, before it is dispatched
            or wrapped.
        config: the settings; by default `RetrofitConfig()`.
        calibration: token batches for an initialisation that fits the tables to the source; none does so far.

    Raises:
        AlreadyRetrofittedError, UnsupportedModelError, PartialMatchError, ConfigError: before anything is changed.
    """
    config = config or RetrofitConfig()
    if calibration is not None:
        raise ConfigError(f"calibration was given, but init='{config.init}' uses none: leave it out")
    family = check_eligible(model.config.to_dict(), model.name_or_path or type(model).__name__)
    attentions = attention_modules(model, family)
    parameters = dict(model.named_parameters())
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if 0 < len(meta) < len(parameters):
        raise UnsupportedModelError(f"{len(meta)} parameters are offloaded ({meta[0]}, ...): retrofit, then dispatch")
    snapshot = _Snapshot(
        attn_implementations={id(m.config): m.config._attn_implementation for m in _models(model)},
        experts_implementation=model.config._experts_implementation,
        architectures=model.config.architectures,
        own_tables={name: getattr(module, TABLE) for name, module in attentions.items() if hasattr(module, TABLE)},
        versions={name: parameter._version for name, parameter in parameters.items()},
    )
    settings = describe(model, config, family.mechanism)
    for submodel in _models(model):
        submodel.config.rpb_retrofit = settings
        submodel.config.auto_map = auto_map(submodel.config)
    try:
        attach(model)
    except Exception:
        _forget(model)
        raise
    initialise(model, config)
    setattr(model, _SNAPSHOT, snapshot)
    return report(model, config)


def revert(model: PreTrainedModel) -> None:
    """Undo `retrofit` in place: the source's class, mechanism and, bit for bit, its logits.

    Raises RevertError where this is not the process that retrofitted the model, or its weights changed since: then
    they are no longer the source's, and the message names the checkpoint that has them. NotRetrofittedError for
    a plain model.
    """
    settings = getattr(model.config, "rpb_retrofit", None)
    if settings is None:
        raise NotRetrofittedError(f"{type(model).__name__} '{model.name_or_path}' is not a retrofit: nothing to revert")
    snapshot: _Snapshot | None = getattr(model, _SNAPSHOT, None)
    if snapshot is None:
        raise RevertError(
            f"this {type(model).__name__} was loaded or copied after its retrofit, so its source cannot be restored "
            f"from it: load the source again from '{settings['source']}'"
        )
    now = dict(model.named_parameters())
    changed = [
        name
        for name, version in snapshot.versions.items()
        if not name.endswith(f"{TABLE}.weight") and (name not in now or now[name]._version != version)
    ]
    if changed:
        raise RevertError(
            f"{len(changed)} of the source's parameters changed since the retrofit ({changed[0]}"
            f"{', ...' if len(changed) > 1 else ''}): load the source again from '{settings['source']}'"
        )
    detach(model)
    for name, module in snapshot.own_tables.items():
        attention: Any = model.get_submodule(name)
        setattr(attention, TABLE, module)
        attention.has_relative_attention_bias = True
    _forget(model)
    for submodel in _models(model):
        config = submodel.config
        config._attn_implementation_internal = snapshot.attn_implementations[id(config)]
        config._experts_implementation_internal = snapshot.experts_implementation
    model.config.architectures = snapshot.architectures
    delattr(model, _SNAPSHOT)


def describe(model: PreTrainedModel, config: RetrofitConfig, mechanism: str) -> dict[str, Any]:
    """What the model's config says about its retrofit: the key ``rpb_retrofit`` of config.json."""
    return {
        "version": __version__,
        "source": str(model.name_or_path or type(model).__name__),
        "mechanism": mechanism,
        **asdict(config),
    }


def auto_map(config: Any) -> dict[str, str]:
    """For every Auto class that serves this config, the retrofitted class in the checkpoint's own code."""
    classes = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            served = mapping[type(config)]
            model = served[0] if isinstance(served, tuple | list) else served
            classes[name] = f"modeling.Rpb{model.__name__}"
    return classes


@torch.no_grad()
def initialise(model: PreTrainedModel, config: RetrofitConfig) -> None:
    """Fill the tables of an attached model."""
    for name in table_names(model):
        table = model.get_parameter(name)
        table.copy_(INITIALISATIONS[config.init](*table.shape))


def report(model: PreTrainedModel, config: RetrofitConfig) -> RetrofitReport:
    """Describe an attached model."""
    family = family_of(model.config)
    attentions = attention_modules(model, family)
    tables = table_names(model)
    return RetrofitReport(
        mechanism=family.mechanism,
        layers_expected=len(attentions),
        layers_patched=[name for name, module in attentions.items() if hasattr(module, TABLE)],
        tables=tables,
        parameters_added=sum(model.get_parameter(name).numel() for name in tables),
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        init=config.init,
    )


def _models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _forget(model: nn.Module) -> None:
    """Take off the configs (submodels may share one) what the retrofit wrote there."""
    for submodel in _models(model):
        for name in ("rpb_retrofit", "auto_map", "attn_implementation", "experts_implementation"):
            vars(submodel.config).pop(name, None)
