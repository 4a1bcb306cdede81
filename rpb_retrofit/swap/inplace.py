"""Retrofitting a model in memory, and going back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError, NotRetrofittedError, RevertError, UnsupportedModelError
from rpb_retrofit.files.finite import check_finite
from rpb_retrofit.files.spool import temporary_spool
from rpb_retrofit.runtime.families import FACTOR, TABLE, UNSCALED, is_own
from rpb_retrofit.runtime.modeling import UNSAVED, attach, attention_modules, detach, on, own_names, submodels
from rpb_retrofit.swap.eligibility import check_eligible
from rpb_retrofit.swap.filling import fill
from rpb_retrofit.swap.report import RetrofitReport, report
from rpb_retrofit.swap.stored_settings import auto_map, describe
from rpb_retrofit.tables import CALIBRATED, CONTENT, FROM, INITIALISATIONS
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.bucket_search import TRIED_FIRST, Candidate
from rpb_retrofit.tables.calibrate import Calibration, check_windows
from rpb_retrofit.tables.checksums import record
from rpb_retrofit.tables.folding import fold
from rpb_retrofit.tables.polish import Polish
from rpb_retrofit.tables.unscaling import unscale

_SNAPSHOT = "_rpb_source"


_WRITTEN = (
    *("rpb_retrofit", "auto_map", "attn_implementation", "experts_implementation", "architectures"),
    *("_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path"),
)
"""What a retrofit, or saving it, writes into a config."""

Fingerprint = tuple[torch.dtype, torch.Size, int]
"""Of a parameter: dtype, shape, and the sum of its bits read as integers."""


@dataclass
class _Snapshot:
    """What `revert` needs and the retrofitted model no longer holds."""

    configs: list[tuple[Any, dict[str, Any]]]  # each config, and its attributes as they were
    names: list[tuple[PreTrainedModel, str | None]]  # each model, and where it was loaded from
    own_tables: dict[str, nn.Module]  # T5's
    fingerprints: dict[str, Fingerprint]  # of the source's parameters, T5's tables aside; of folded ones, as folded
    folded: dict[str, torch.Tensor] = field(default_factory=dict)  # weights as they were before something was folded in

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or pickled model has configs of its own, so it has no snapshot


def retrofit(
    model: PreTrainedModel,
    config: RetrofitConfig | None = None,
    calibration: Any | None = None,
    polishing: Any | None = None,
) -> RetrofitReport:
    """Swap the positional mechanism of ``model`` for the T5 bucketed bias, in place.

    No weight of the source changes, but for what makes the queries with ``calibrate="tables+content"`` or
    ``scale="unscaled"``; `revert` gives
    the source back bit for bit. ``save_pretrained`` then writes a checkpoint
    that loads with `rpb_retrofit.load` or, without this package, with ``trust_remote_code=True``.

    Args:
        model: any model whose family has a row in ``runtime/families.py``, on any device, before it is dispatched
            or wrapped.
        config: the settings; by default `RetrofitConfig()`.
        calibration: text for ``init="calibrated"``: batches of token ids, (n,) or (batch, n), unpadded. A few windows
            as long as the trained context or as the maximum distance, together some thousand tokens, will do. With
            ``init="from:..."`` it decides which head gets the table of which.
        polishing: text for ``polish``, likewise: 512 tokens a step; by default ``calibration``'s, again and again.

    Raises:
        AlreadyRetrofittedError, UnsupportedModelError, PartialMatchError, ConfigError, DataError, and CheckpointError
            where a weight holds NaN or infinity: the model is left as it was.
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
    _check_values(model, config.changes_weights or calibration is not None or config.polish > 0)
    check_finite(
        {name: p for name, p in model.named_parameters() if _has_values(p)}, model.name_or_path or type(model).__name__
    )
    snapshot = _Snapshot(
        configs=[(config, dict(vars(config))) for config in _distinct(m.config for m in submodels(model))],
        names=[(m, m.name_or_path) for m in submodels(model)],
        own_tables={name: getattr(module, TABLE) for name, module in attentions.items() if hasattr(module, TABLE)},
        fingerprints=_fingerprints(model),
    )
    config, unscaled = replace(config, scale="source"), config.scale == UNSCALED  # the last thing to be done
    first = _with_buckets(config, TRIED_FIRST) if config.relative_attention_num_buckets == "auto" else config
    windows = check_windows(model, calibration) if calibration is not None else []
    settings = describe(model, first, family, windows)
    with temporary_spool(AttentionRows) as spool:
        fitting = polish = None
        if windows:
            kept = max(settings.get("kept_frequencies", {"": 0}).values())
            fitting = Calibration(family, windows, config.seed, spool, kept)
            fitting.record(model, attentions)
        if config.polish:
            lessons = windows if polishing is None else check_windows(model, polishing)
            polish = Polish(lessons, config.polish, spool)
            polish.teach(model)
        try:
            _attach(model, settings)
        except BaseException:
            _restore_configs(snapshot)
            raise
        setattr(model, _SNAPSHOT, snapshot)
        try:
            choice = None
            if config.relative_attention_num_buckets == "auto":
                assert fitting is not None, "a config without calibration chooses no buckets"
                choice = fitting.choose(model, attentions)
                config = _with_buckets(config, choice.chosen)
                detach(model)
                _attach(model, describe(model, config, family, windows))
            found, notes = fill(model, config, fitting, attentions)
            polished = None if polish is None else polish.apply(model, own_names(model))
            if config.calibrate == CONTENT:
                assert fitting is not None, "a config without calibration fits no factors"
                fold(model, family, attentions, fitting.windows[0], fitting.kept, snapshot.folded)
            factors = len(snapshot.folded)
            scales = unscale(model, attentions, snapshot.folded) if unscaled else 0
            snapshot.fingerprints |= {name: _fingerprint(model.get_parameter(name)) for name in snapshot.folded}
            record(model)
        except BaseException:
            _unfold(model, snapshot)
            revert(model)
            raise
    _rename(model)
    said = [*([str(choice)] if choice else []), *notes]
    if config.calibrate == CONTENT:
        said.append(_where_factors_are(model, factors))
    if unscaled:
        folded_in = f"scale of the scores folded into {scales} weights that make queries"
        said.append(folded_in if scales else "scores had no scale")
    return report(model, said, found, polished)


def _check_values(model: nn.Module, needed: bool) -> None:
    """UnsupportedModelError where parameters are elsewhere, in pieces, or (``needed``) without values."""
    parameters = dict(model.named_parameters())
    if (name := _sharded(model)) is not None:
        raise UnsupportedModelError(
            f"{name} is sharded (by FSDP2, tensor parallelism or DeepSpeed's ZeRO-3): retrofit, then shard"
        )
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if 0 < len(meta) < len(parameters):
        raise UnsupportedModelError(f"{len(meta)} parameters are offloaded ({meta[0]}, ...): retrofit, then dispatch")
    without = [name for name, parameter in parameters.items() if not _has_values(parameter)]
    if without and needed:
        where = "on the meta device" if meta else "a fake tensor"
        raise UnsupportedModelError(f"{without[0]} is {where}, without a value to go by: load the weights")


def _sharded(model: nn.Module) -> str | None:
    """The first parameter of which this process holds a piece, or None."""
    pieces = (name for name, p in model.named_parameters() if isinstance(p, DTensor) or hasattr(p, "ds_id"))
    return next(pieces, None)


def _has_values(parameter: torch.Tensor) -> bool:
    return not parameter.is_meta and not isinstance(parameter, FakeTensor)


def _where_factors_are(model: PreTrainedModel, folded: int) -> str:
    kept = sum(parameter.numel() for name, parameter in model.named_parameters() if FACTOR in name)
    if kept:
        return (
            f"factors on the content term kept as {kept:,} parameters: a norm stands between the query projections and "
            "the scores"
        )
    return f"factors on the content term folded into {folded} weights of the query projections"


def _with_buckets(config: RetrofitConfig, chosen: Candidate) -> RetrofitConfig:
    return replace(
        config,
        relative_attention_num_buckets=chosen.num_buckets,
        relative_attention_max_distance=chosen.max_distance,
    )


def _attach(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = settings
        submodel.config.auto_map = auto_map(submodel.config)
    attach(model)


def _rename(model: PreTrainedModel) -> None:
    """Take the source's name off the model and its configs: what is trained on it would name that as its base."""
    for submodel in submodels(model):
        submodel.name_or_path, submodel.config.name_or_path = UNSAVED, ""


def _check_text(config: RetrofitConfig, calibration: Any | None, polishing: Any | None) -> None:
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


def folded(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of a model that was retrofitted in this process: the weights that something was folded into, as they were."""
    snapshot: _Snapshot = getattr(model, _SNAPSHOT)
    return snapshot.folded


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
    if (name := _sharded(model)) is not None:
        raise RevertError(
            f"{name} was sharded after the retrofit, so this process has no whole weights to compare: load the source "
            f"again from '{settings['source']}'"
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
        setattr(attention, TABLE, on(next(attention.parameters()).device, module))
        attention.has_relative_attention_bias = True
    _restore_configs(snapshot)
    for submodel, name in snapshot.names:
        submodel.name_or_path = name
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
    if not _has_values(parameter):
        return parameter.dtype, parameter.shape, 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
    return parameter.dtype, parameter.shape, int(bits.sum(dtype=torch.int64))
