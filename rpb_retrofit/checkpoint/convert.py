"""Retrofitting a checkpoint on disk. Its weights are placed, not loaded: only config and tables are new."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rpb_retrofit.checkpoint.limits import lift_limits
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.contents import CODE_KEYS, without_code
from rpb_retrofit.files.finite import check_stored
from rpb_retrofit.files.folder import check_absent, whole_folder
from rpb_retrofit.files.headers import check_headers
from rpb_retrofit.files.json_file import save_json
from rpb_retrofit.files.printable import first_of
from rpb_retrofit.files.shards import place, place_without, tensor_names
from rpb_retrofit.files.source import INDEX, Source, expanded, find
from rpb_retrofit.runtime.families import is_own
from rpb_retrofit.swap.eligibility import check_eligible
from rpb_retrofit.tables import CALIBRATED

if TYPE_CHECKING:
    from rpb_retrofit.checkpoint.in_memory import InMemory, Measure
    from rpb_retrofit.swap.report import RetrofitReport
    from rpb_retrofit.text.calibration_text import CalibrationText

# Transformers is imported late in this file: its import and the copying of gigabytes overlap.

RENAMED = {"README.md": "README.source.md"}
"""The source's model card does not describe the retrofit, but its licence and origin must travel."""


@dataclass(frozen=True)
class Conversion:
    """What was written: the report of the retrofit, and how the weights got there. ``measured``: source and retrofit,
    where they were loaded."""

    report: RetrofitReport
    out: Path
    shards: int
    weights: str  # "linked" (what did not change), "copied" or "dequantised"
    measured: tuple[Any, Any] | None = None


def retrofit_checkpoint(
    source: str,
    out: str | Path,
    config: RetrofitConfig,
    *,
    link: bool = False,
    calibration: CalibrationText | None = None,
    measure: Measure | None = None,
) -> Conversion:
    """Retrofit ``source`` (a folder, a hub id, or a GGUF file) into a new folder ``out``.

    ``out`` appears whole or not at all. With ``link`` the shards are hard links to the source's (instant, no space);
    else clones where the file system can share blocks, else copies. Factors on the content term, and its scale, are
    written into those that hold what makes the queries, which are then no links. Saving a model over a link replaces
    the link, never the source's file. Weights are loaded only where some change or the tables are calibrated, on
    ``calibration`` or by default on Python's help texts, and from a GGUF file, which is dequantised to float32. Where
    they are loaded, ``measure`` is called on the source and on the retrofit.

    Raises CheckpointError, UnsupportedModelError, AlreadyRetrofittedError, PartialMatchError, ConfigError or DataError.
    """
    out = expanded(out)
    check_absent(out)
    if config.init != CALIBRATED and not config.polish:
        if calibration is not None and not config.takes_text:
            raise ConfigError(f"calibration text was given, but init='{config.init}' uses none: leave it out")
    elif calibration is None:
        from rpb_retrofit.text.calibration_text import CalibrationText

        calibration = CalibrationText.of(None)
    if source.endswith(".gguf"):
        return _convert_gguf(expanded(source), out, config, calibration, measure)
    checkpoint = find(source)
    check_eligible(checkpoint.settings, source)
    return _convert_folder(checkpoint, out, config, link, calibration, measure)


def _convert_folder(
    source: Source,
    out: Path,
    config: RetrofitConfig,
    link: bool,
    calibration: CalibrationText | None,
    measure: Measure | None,
) -> Conversion:
    shards, stop = source.shards, threading.Event()
    with whole_folder(out) as folder, ThreadPoolExecutor(1) as pool:
        placing = pool.submit(_place_weights, shards, folder, link, stop)
        try:
            notes = _copy_companions(source, folder)
            shard = f"model-{_of(len(shards) + 1, shards)}"
            done = _write_all_but_weights(source, config, folder, shard, calibration, measure)
            report, tables, changes = done.report, dict.fromkeys(done.tables, shard), done.changes
            report.notes.extend(lift_limits(folder, report.mechanism, source.folder))
            report.notes.extend(notes)
        except BaseException:
            stop.set()
            raise
        weight_map, linked = placing.result()
        if changes:
            from rpb_retrofit.checkpoint.rewrite import rewrite

            linked = len(rewrite(folder, weight_map, changes)) < len(shards) and linked
        weight_map |= tables
        total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        save_json(folder / INDEX, index)
    return Conversion(report, out, len(shards) + 1, "linked" if linked else "copied", done.measured)


def _copy_companions(source: Source, folder: Path) -> list[str]:
    """Copy what travels as it is, but for names of code in it; notes on what was left behind."""
    notes = []
    for file in source.companions:
        target = folder / RENAMED.get(str(file), file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if cleaned := without_code(source.folder / file):
            content, names = cleaned
            save_json(target, content)
            notes.append(f"left behind: {', '.join(sorted(set(names)))} of {file}, which name code of the source's")
        else:
            shutil.copyfile(source.folder / file, target)
    if left := source.left_behind:
        notes.append(f"left behind, being code, pickles or other weights: {', '.join(map(str, left))}")
    if any(name in source.settings for name in CODE_KEYS):
        notes.append("left behind: what config.json names of the source's own code")
    return notes


def _place_weights(shards: list[Path], folder: Path, link: bool, stop: threading.Event) -> tuple[dict[str, str], bool]:
    """Place the shards as the first of ``len(shards) + 1``; which tensor is in which, and whether all are links."""
    weight_map: dict[str, str] = {}
    linked = link
    with tqdm(total=sum(shard.stat().st_size for shard in shards), unit="B", unit_scale=True, desc="weights") as bar:

        def progress(length: int) -> None:
            bar.update(length)
            if stop.is_set():
                raise CancelledError

        for number, shard in enumerate(shards, 1):
            name, tensors = f"model-{_of(number, shards)}", tensor_names(shard)
            own = [tensor for tensor in tensors if is_own(tensor)]
            if own:  # T5's tables make way
                linked = False
                place_without(shard, folder / name, own, progress)
            else:
                place(shard.resolve(), folder / name, link=link, progress=progress)
            weight_map |= {tensor: name for tensor in tensors if tensor not in own}
    return weight_map, linked


def _write_all_but_weights(
    source: Source,
    config: RetrofitConfig,
    folder: Path,
    shard: str,
    calibration: CalibrationText | None,
    measure: Measure | None,
) -> InMemory:
    """Write config, runtime and tables."""
    from safetensors.torch import save_file

    from rpb_retrofit.checkpoint.in_memory import loaded, unloaded
    from rpb_retrofit.checkpoint.load import check_generation
    from rpb_retrofit.runtime.locks import save_config
    from rpb_retrofit.runtime.modeling import write_runtime

    settings = source.config()
    unused = check_headers(source, settings)
    check_generation(source)
    for name in CODE_KEYS:
        vars(settings).pop(name, None)
    if calibration is not None or config.changes_weights:
        done = loaded(source, settings, config, calibration, measure)
    else:
        check_stored(source.shards, source.name, unused)  # what is not loaded is looked at while it is copied
        done = unloaded(settings, config)
    done.model.config.architectures = [type(done.model).__name__]
    save_config(done.model.config, folder)
    write_runtime(folder)
    save_file(done.tables, folder / shard, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / shard)  # safetensors lets nobody but the owner read its files
    if unused:
        done.report.notes.append(
            f"{len(unused)} tensors that {type(done.model).__name__} has no use for travel along: {first_of(unused)}"
        )
    return done


def _of(number: int, shards: list[Path]) -> str:
    return f"{number:05d}-of-{len(shards) + 1:05d}.safetensors"


def _convert_gguf(
    file: Path, out: Path, config: RetrofitConfig, calibration: CalibrationText | None, measure: Measure | None
) -> Conversion:
    from rpb_retrofit.checkpoint.gguf import load_gguf
    from rpb_retrofit.checkpoint.in_memory import retrofit_measured
    from rpb_retrofit.checkpoint.load import on_gpu

    model, tokenizer = load_gguf(file)
    model = on_gpu(model)
    report, measured = retrofit_measured(model, tokenizer, config, calibration, measure)
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report.notes.extend(lift_limits(folder, report.mechanism))
    return Conversion(report, out, 1, "dequantised", measured)
