"""Retrofitting a model in memory, and going back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError, NotRetrofittedError, RevertError
from rpb_retrofit.files.spool import Spool, temporary_spool
from rpb_retrofit.frequencies import KeepFrequencies
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import own_names
from rpb_retrofit.runtime.families import FACTOR, UNSCALED
from rpb_retrofit.runtime.modeling import UNSAVED, attach, detach
from rpb_retrofit.swap.filling import fill
from rpb_retrofit.swap.kept_frequencies import kept_by_attention
from rpb_retrofit.swap.model_checks import check_model, check_text, sharded
from rpb_retrofit.swap.report import RetrofitReport, report
from rpb_retrofit.swap.snapshot import SNAPSHOT, Snapshot, fingerprints
from rpb_retrofit.swap.stored_settings import auto_map, describe
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.bucket_search import TRIED_FIRST, Candidate
from rpb_retrofit.tables.calibrate import Calibration, check_windows
from rpb_retrofit.tables.checksums import record
from rpb_retrofit.tables.folding import fold
from rpb_retrofit.tables.layer_needs import layer_needs
from rpb_retrofit.tables.polish import Polish
from rpb_retrofit.tables.unscaling import unscale


def retrofit(
    model: PreTrainedModel,
    config: RetrofitConfig | None = None,
    calibration: Iterable[Any] | None = None,
    polishing: Iterable[Any] | None = None,
) -> RetrofitReport:
    """Swap the positional mechanism of ``model`` for the T5 bucketed bias, in place.

    Weights stay the source's, but for what makes the queries with ``calibrate="tables+content"`` or
    ``scale="unscaled"``; `revert` gives all back bit for bit. ``save_pretrained`` then writes a checkpoint that loads
    with `rpb_retrofit.load` or, without this package, with ``trust_remote_code=True``.

    Args:
        model: of a family with a row in ``runtime/families.py``, on any device, before it is dispatched or wrapped.
        config: the settings; by default `RetrofitConfig()`.
        calibration: text for ``init="calibrated"``: batches of token ids, (n,) or (batch, n), unpadded. A few windows
            as long as the trained context or as the maximum distance, together some thousand tokens, will do. With
            ``init="from:..."`` it decides which head gets the table of which.
        polishing: likewise for ``polish``, 512 tokens a step; by default ``calibration``'s, again and again.

    Raises AlreadyRetrofittedError, UnsupportedModelError, PartialMatchError, ConfigError, DataError, or CheckpointError
    for weights that are NaN or infinite; the model is left as it was.
    """
    config = config or RetrofitConfig()
    check_text(config, calibration, polishing)
    anatomy = check_model(model, config, reads_text=calibration is not None)
    snapshot = Snapshot.of(anatomy)
    windows = check_windows(model, calibration) if calibration is not None else []
    unscaled, config = config.scale == UNSCALED, replace(config, scale="source")  # the scale is folded last
    settings = describe(anatomy, _first(config), windows)
    notes: list[str] = []
    with temporary_spool(AttentionRows) as spool:
        calibrating = _record(anatomy, config, settings, windows, spool)
        polish = _teach(model, config, windows, polishing, spool)
        with snapshot.or_restored():
            _attach(anatomy, settings)
            setattr(model, SNAPSHOT, snapshot)
            config = _choose(anatomy, config, calibrating, notes)
            calibrated, conversions = fill(anatomy, config, calibrating)
            polished = None if polish is None else polish.apply(model, own_names(model))
            notes += conversions
            if config.calibrate == CONTENT:
                notes.append(_fold_factors(anatomy, calibrating, snapshot))
            if unscaled:
                notes.append(_fold_scale(anatomy, snapshot))
            snapshot.take_folded_fingerprints()
            record(model)
    _rename(anatomy)
    return report(anatomy, notes, calibrated, polished)


def _first(config: RetrofitConfig) -> RetrofitConfig:
    """What is attached first: T5's buckets, where they are yet to be chosen."""
    return _with_buckets(config, TRIED_FIRST) if config.relative_attention_num_buckets == "auto" else config


def _with_buckets(config: RetrofitConfig, chosen: Candidate) -> RetrofitConfig:
    return replace(
        config,
        relative_attention_num_buckets=chosen.num_buckets,
        relative_attention_max_distance=chosen.max_distance,
    )


def _record(
    anatomy: Anatomy, config: RetrofitConfig, settings: dict[str, Any], windows: Sequence[Tensor], spool: Spool
) -> Calibration | None:
    """What the source's attention does on the text, if there is any."""
    if not windows:
        return None
    calibration = Calibration(anatomy, windows, config.seed, spool, kept_by_attention(anatomy, settings))
    calibration.record()
    return calibration


def _teach(
    model: PreTrainedModel, config: RetrofitConfig, windows: list[Tensor], polishing: Any | None, spool: Spool
) -> Polish | None:
    """What the source predicts on the text, where tables will be polished."""
    if not config.polish:
        return None
    polish = Polish(windows if polishing is None else check_windows(model, polishing), config.polish, spool)
    polish.teach(model)
    return polish


def _attach(anatomy: Anatomy, settings: dict[str, Any]) -> None:
    for submodel in anatomy.submodels:
        submodel.config.rpb_retrofit = settings
        submodel.config.auto_map = auto_map(submodel.config)
    attach(anatomy)


def _choose(
    anatomy: Anatomy, config: RetrofitConfig, calibration: Calibration | None, notes: list[str]
) -> RetrofitConfig:
    """The settings with what was left to the text, and the model attached with it; ``notes`` say what was chosen."""
    if config.relative_attention_num_buckets == "auto":
        config = _choose_buckets(anatomy, config, calibration, notes)
    if more := KeepFrequencies.of(config.keep_frequencies).more:
        _choose_layers(anatomy, config, more, calibration, notes)
    return config


def _choose_buckets(
    anatomy: Anatomy, config: RetrofitConfig, calibration: Calibration | None, notes: list[str]
) -> RetrofitConfig:
    """The settings with the buckets that held-out text chooses, and the model attached with them."""
    assert calibration is not None, "a config without calibration chooses no buckets"
    choice = calibration.choose()
    notes.append(str(choice))
    config = _with_buckets(config, choice.chosen)
    detach(anatomy)
    _attach(anatomy, describe(anatomy, config, calibration.windows))
    return config


def _choose_layers(
    anatomy: Anatomy, config: RetrofitConfig, more: int, calibration: Calibration | None, notes: list[str]
) -> None:
    """Attach the model anew, with all frequencies in the layers that far copies need most."""
    assert calibration is not None, "a config without calibration chooses no layers"
    calibration.fill_roughly()
    needs = layer_needs(anatomy, calibration.windows, config.seed)
    kept, numbers = kept_by_attention(anatomy, anatomy.model.config.rpb_retrofit), list(anatomy.attentions)
    lacking = [name for name in needs if kept.get(name, 0) < anatomy.rotary_counts[anatomy.rotary_buffers[name]]]
    if len(lacking) < more:
        raise ConfigError(
            f"keep_frequencies={config.keep_frequencies}: {len(lacking)} layers do not keep all already; choose fewer"
        )
    chosen = sorted(numbers.index(name) for name in sorted(lacking, key=lambda name: -needs[name])[:more])
    rest = sorted((needs[name] for name in lacking), reverse=True)[more:]
    gains = ", ".join(f"{number} ({needs[numbers[number]]:.2f})" for number in chosen)
    notes.append(
        f"all frequencies kept in the layers {gains}: nats a token by which the loss of far copies would fall with a "
        "layer's rotation back, by its derivative" + (f"; the most of another layer is {rest[0]:.2f}" if rest else "")
    )
    detach(anatomy)
    settings = describe(anatomy, config, calibration.windows, chosen)
    _attach(anatomy, settings)
    calibration.kept = kept_by_attention(anatomy, settings)


def _fold_factors(anatomy: Anatomy, calibration: Calibration | None, snapshot: Snapshot) -> str:
    """Fold the factors on the content term where that is exact; what came of it."""
    assert calibration is not None, "a config without calibration fits no factors"
    fold(anatomy, calibration.windows[0], calibration.kept, snapshot.folded)
    if kept := sum(parameter.numel() for name, parameter in anatomy.model.named_parameters() if FACTOR in name):
        return (
            f"factors on the content term kept as {kept:,} parameters: a norm stands between the query projections and "
            "the scores"
        )
    return f"factors on the content term folded into {len(snapshot.folded)} weights of the query projections"


def _fold_scale(anatomy: Anatomy, snapshot: Snapshot) -> str:
    """Fold the scale of the content term; what came of it."""
    changed = unscale(anatomy, snapshot.folded)
    return f"scale of the scores folded into {changed} weights that make queries" if changed else "scores had no scale"


def _rename(anatomy: Anatomy) -> None:
    """Take the source's name off the model and its configs: what is trained on it would name that as its base."""
    for submodel in anatomy.submodels:
        submodel.name_or_path, submodel.config.name_or_path = UNSAVED, ""


def revert(model: PreTrainedModel) -> None:
    """Undo `retrofit` in place: the source's class, mechanism and, bit for bit, its logits.

    Raises RevertError where this is not the process that retrofitted the model, or its weights (compared by dtype,
    shape and a checksum of their bits) are no longer the source's: the message names the checkpoint that has them.
    NotRetrofittedError for a plain model.
    """
    settings = getattr(model.config, "rpb_retrofit", None)
    if settings is None:
        raise NotRetrofittedError(f"{type(model).__name__} '{model.name_or_path}' is not a retrofit: nothing to revert")
    snapshot: Snapshot | None = getattr(model, SNAPSHOT, None)
    if snapshot is None:
        raise RevertError(
            f"this {type(model).__name__} was loaded or copied after its retrofit, so its source cannot be restored "
            f"from it: load the source again from '{settings['source']}'"
        )
    if (name := sharded(model)) is not None:
        raise RevertError(
            f"{name} was sharded after the retrofit, so this process has no whole weights to compare: load the source "
            f"again from '{settings['source']}'"
        )
    now, before = fingerprints(model), snapshot.fingerprints
    if changed := [name for name in before if now.get(name) != before[name]]:
        raise RevertError(
            f"{len(changed)} of the source's parameters changed since the retrofit ({changed[0]}"
            f"{', ...' if len(changed) > 1 else ''}): load the source again from '{settings['source']}'"
        )
    snapshot.restore()
