"""Retrofitting a model in memory, and going back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.eligibility import check_eligible
from rpb_retrofit.errors import ConfigError, NotRetrofittedError, RevertError, UnsupportedModelError
from rpb_retrofit.runtime.families import FACTOR, TABLE, Family, family_of, is_own
from rpb_retrofit.runtime.mechanisms import inverse_frequencies, rotary_pairs, trained_context
from rpb_retrofit.runtime.modeling import attach, attention_modules, block_names, detach, own_names, submodels, table_names
from rpb_retrofit.tables import CALIBRATED, CONTENT, FROM, INITIALISATIONS
from rpb_retrofit.tables.calibrate import Calibration, CalibrationReport, check_windows
from rpb_retrofit.tables.folding import fold
from rpb_retrofit.tables.place import Place
from rpb_retrofit.tables.polish import Polish, PolishReport
from rpb_retrofit.tables.reuse import Reused, reuse
from rpb_retrofit.tables.spool import temporary_spool
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
    calibration: CalibrationReport | None = None
    polish: PolishReport | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        swap = (
            f"{self.mechanism} -> T5 bias: {len(self.layers_patched)} of {self.layers_expected} layers patched, "
            f"{len(self.tables)} tables of {self.num_buckets} buckets to distance {self.max_distance} "
            f"(init {self.init}), {self.parameters_added:,} parameters added"
        )
        more = [str(part) for part in (self.calibration, self.polish) if part is not None]
        return "\n".join([swap, *self.notes, *more])


_WRITTEN = (
    *("rpb_retrofit", "auto_map", "attn_implementation", "experts_implementation", "architectures"),
    *("_attn_implementation_internal", "_experts_implementation_internal"),
)
"""What a retrofit, or saving it, writes into a config."""

Fingerprint = tuple[torch.dtype, torch.Size, int]
"""Of a parameter: dtype, shape, and the sum of its bits read as integers."""


@dataclass
class _Snapshot:
    """What `revert` needs and the retrofitted model no longer holds."""

    configs: list[tuple[Any, dict[str, Any]]]  # each config, and its attributes as they were
    own_tables: dict[str, nn.Module]  # T5's
    fingerprints: dict[str, Fingerprint]  # of the source's parameters, T5's tables aside; of folded ones, as folded
    folded: dict[str, torch.Tensor] = field(default_factory=dict)  # weights as they were before factors were folded in

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or pickled model has configs of its own, so it has no snapshot


def retrofit(
    model: PreTrainedModel,
    config: RetrofitConfig | None = None,
    calibration: Any | None = None,
    polishing: Any | None = None,
) -> RetrofitReport:
    """Swap the positional mechanism of ``model`` for the T5 bucketed bias, in place.

    No weight of the source changes; `revert` gives it back bit for bit. ``save_pretrained`` then writes a checkpoint
    that loads with `rpb_retrofit.load` or, without this package, with ``trust_remote_code=True``.

    Args:
        model: any model whose family has a row in ``runtime/families.py``, on any device, before it is dispatched
            or wrapped.
        config: the settings; by default `RetrofitConfig()`.
        calibration: text for ``init="calibrated"``: batches of token ids, (n,) or (batch, n), unpadded. A few windows
            as long as the trained context or as the maximum distance, together some thousand tokens, will do.
        polishing: text for ``polish``, likewise: 512 tokens a step; by default ``calibration``'s, again and again.

    Raises:
        AlreadyRetrofittedError, UnsupportedModelError, PartialMatchError, ConfigError, DataError: the model is left as
            it was.
    """
    config = config or RetrofitConfig()
    _check_text(config, calibration, polishing)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a Transformers model: retrofit first, then wrap it")
    family = check_eligible(model.config.to_dict(), model.name_or_path or type(model).__name__)
    if config.init == CALIBRATED and family.mechanism == "t5":
        raise ConfigError(
            f"init='calibrated': '{model.name_or_path or type(model).__name__}' has T5's tables already, nothing is to "
            f"be fitted; take them over with init='{FROM}{model.name_or_path or 'CHECKPOINT'}'"
        )
    attentions = attention_modules(model, family)
    parameters = dict(model.named_parameters())
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if 0 < len(meta) < len(parameters):
        raise UnsupportedModelError(f"{len(meta)} parameters are offloaded ({meta[0]}, ...): retrofit, then dispatch")
    snapshot = _Snapshot(
        configs=[(config, dict(vars(config))) for config in _distinct(m.config for m in submodels(model))],
        own_tables={name: getattr(module, TABLE) for name, module in attentions.items() if hasattr(module, TABLE)},
        fingerprints=_fingerprints(model),
    )
    settings = describe(model, config, family)
    with temporary_spool() as spool:
        fitting = polish = None
        if calibration is not None:
            kept = max(settings.get("kept_frequencies", {"": 0}).values())
            fitting = Calibration(family, check_windows(model, calibration), config.seed, spool, kept)
            fitting.record(model, attentions)
        if config.polish:
            windows = check_windows(model, calibration if polishing is None else polishing)
            polish = Polish(windows, config.polish, spool)
            polish.teach(model)
        for submodel in submodels(model):
            submodel.config.rpb_retrofit = settings
            submodel.config.auto_map = auto_map(submodel.config)
        try:
            attach(model)
        except BaseException:
            _restore_configs(snapshot)
            raise
        setattr(model, _SNAPSHOT, snapshot)
        try:
            found = _fill(model, config) if fitting is None else fitting.apply(model, attentions)
            polished = None if polish is None else polish.apply(model, own_names(model))
            if config.calibrate == CONTENT:
                assert fitting is not None, "a config without calibration fits no factors"
                fold(model, family, attentions, fitting.windows[0], fitting.kept, snapshot.folded)
                snapshot.fingerprints |= {name: _fingerprint(model.get_parameter(name)) for name in snapshot.folded}
        except BaseException:
            _unfold(model, snapshot)
            revert(model)
            raise
    return report(model, config, found, polished)


def _check_text(config: RetrofitConfig, calibration: Any | None, polishing: Any | None) -> None:
    if calibration is None and config.init == CALIBRATED:
        raise ConfigError(
            "init='calibrated' needs text: give calibration=[batches of token ids], or choose another init: "
            f"{', '.join(INITIALISATIONS)}"
        )
    if calibration is not None and config.init != CALIBRATED:
        raise ConfigError(f"calibration was given, but init='{config.init}' uses none: leave it out")
    if polishing is not None and not config.polish:
        raise ConfigError("polishing was given, but polish=0 uses none: leave it out")
    if config.polish and calibration is None and polishing is None:
        raise ConfigError(f"polish={config.polish} needs text: give polishing=[batches of token ids]")


def revert(model: PreTrainedModel) -> None:
    """Undo `retrofit` in place: the source's class, mechanism and, bit for bit, its logits.

    Raises RevertError where this is not the process that retrofitted the model, or its weights (compared by dtype,
    shape and a checksum of their bits) are no longer the source's: the message names the checkpoint that has them.
    NotRetrofittedError for a plain model.
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
    now, before = _fingerprints(model), snapshot.fingerprints
    if changed := [name for name in before if now.get(name) != before[name]]:
        raise RevertError(
            f"{len(changed)} of the source's parameters changed since the retrofit ({changed[0]}"
            f"{', ...' if len(changed) > 1 else ''}): load the source again from '{settings['source']}'"
        )
    _unfold(model, snapshot)
    detach(model)
    for name, module in snapshot.own_tables.items():
        attention: Any = model.get_submodule(name)
        setattr(attention, TABLE, module.to(next(attention.parameters()).device))
        attention.has_relative_attention_bias = True
    _restore_configs(snapshot)
    delattr(model, _SNAPSHOT)


def _unfold(model: PreTrainedModel, snapshot: _Snapshot) -> None:
    for name, weight in snapshot.folded.items():
        model.get_parameter(name).data.copy_(weight)


def _restore_configs(snapshot: _Snapshot) -> None:
    """What the retrofit wrote into the configs goes; what it replaced comes back."""
    for config, before in snapshot.configs:
        for name in _WRITTEN:
            vars(config).pop(name, None)
            if name in before:
                vars(config)[name] = before[name]


def _distinct(configs: Iterable[Any]) -> list[Any]:
    return list({id(config): config for config in configs}.values())


def _fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """Of all parameters but the tables, the source's (T5's) and the retrofit's."""
    return {name: _fingerprint(parameter) for name, parameter in model.named_parameters() if not is_own(name)}


def _fingerprint(parameter: torch.Tensor) -> Fingerprint:
    if parameter.is_meta:
        return parameter.dtype, parameter.shape, 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
    return parameter.dtype, parameter.shape, int(bits.sum(dtype=torch.int64))


def describe(model: PreTrainedModel, config: RetrofitConfig, family: Family) -> dict[str, Any]:
    """What the model's config says about its retrofit: the key ``rpb_retrofit`` of config.json."""
    kept = kept_frequencies(model, config.keep_frequencies, family)
    return {
        "version": __version__,
        "source": str(model.name_or_path or type(model).__name__),
        "mechanism": family.mechanism,
        **asdict(config),
        **({"kept_frequencies": kept} if kept else {}),
        **({FACTOR: rotary_pairs(model, family)._asdict()} if config.calibrate == CONTENT else {}),
    }


def kept_frequencies(model: PreTrainedModel, keep: int | str, family: Family) -> dict[str, int]:
    """How many of the highest frequencies of each rotary buffer stay; empty where none do."""
    if keep == 0:
        return {}
    source = model.name_or_path or type(model).__name__
    if family.mechanism != "rope":
        raise ConfigError(
            f"keep_frequencies={keep!r}: '{source}' has {family.mechanism} positions and no frequencies: leave it out"
        )
    found = inverse_frequencies(model, family)
    if keep == "auto":
        context = trained_context(model, family) or 0
        kept = {name: int((2 * math.pi / frequencies <= context).sum()) for name, frequencies in found.items()}
        return kept if any(kept.values()) else {}
    for name, frequencies in found.items():
        if int(keep) > len(frequencies):
            raise ConfigError(f"keep_frequencies={keep}: '{source}' has {len(frequencies)} in {name}; keep fewer")
    return dict.fromkeys(found, int(keep))


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


def first_tables(model: PreTrainedModel, config: RetrofitConfig) -> Reused:
    """The tables that an attached model begins with, where they need no text, by parameter name; on the CPU."""
    biases: dict[str, Any] = {name: model.get_submodule(name.removesuffix(".weight")) for name in table_names(model)}
    context = trained_context(model, family_of(model.config)) or 2 * config.relative_attention_max_distance
    if config.init.startswith(FROM):
        wanted = {name: (len(bias.weight), bias.bucketing) for name, bias in biases.items()}
        return reuse(config.init.removeprefix(FROM), wanted, context)
    hidden_size = model.config.get_text_config().hidden_size
    places = {
        name: Place(len(bias.weight), bias.bucketing, hidden_size, context, config.seed + number)
        for number, (name, bias) in enumerate(biases.items())
    }
    return Reused({name: INITIALISATIONS[config.init](place) for name, place in places.items()}, [])


def _fill(model: PreTrainedModel, config: RetrofitConfig) -> Reused:
    found = first_tables(model, config)
    for name, table in found.tables.items():
        model.get_parameter(name).data.copy_(table)
    return found


def report(
    model: PreTrainedModel,
    config: RetrofitConfig,
    found: CalibrationReport | Reused,
    polished: PolishReport | None = None,
) -> RetrofitReport:
    """Describe an attached model, and where its tables come from."""
    family = family_of(model.config)
    attentions = attention_modules(model, family)
    tables = table_names(model)
    return RetrofitReport(
        mechanism=family.mechanism,
        layers_expected=len(block_names(model)),
        layers_patched=[name for name, module in attentions.items() if hasattr(module, TABLE)],
        tables=tables,
        parameters_added=sum(model.get_parameter(name).numel() for name in tables),
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        init=config.init,
        calibration=found if isinstance(found, CalibrationReport) else None,
        polish=polished,
        notes=[] if isinstance(found, CalibrationReport) else found.notes,
    )
