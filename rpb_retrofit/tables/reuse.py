"""Tables taken from another checkpoint: a model of the T5 family, or another retrofit.

Nothing is guessed silently: which layer, head and direction became which is said in notes, and what cannot be
converted is an error. Both conventions of scale (T5 does not divide the content term by the square root of the head's
width) add the bias to what the softmax sees, so the numbers need no conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.headers import check_headers
from rpb_retrofit.files.source import Source, find
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.runtime.settings import check_settings
from rpb_retrofit.tables import FROM
from rpb_retrofit.tables.rebucket import rebucket
from rpb_retrofit.tables.table_spec import Start, TableSpec


@dataclass(frozen=True)
class Found:
    """A table (heads, buckets) of a checkpoint, under its name there, and its tail's slopes where it has one."""

    name: str
    table: Tensor
    bucketing: Bucketing
    slopes: Tensor | None = None


@dataclass(frozen=True)
class Reused:
    """New tables by name, and what was converted on the way."""

    starts: dict[str, Start]
    notes: list[str]


def reuse(checkpoint: str, wanted: Mapping[str, TableSpec]) -> Reused:
    """The tables of ``checkpoint`` for the ``wanted`` tables, by name in the order of their layers.

    Each has as many heads as the checkpoint's: `spread_heads` or a calibration says which head gets which. Raises
    ConfigError where the checkpoint has no tables, or none for a direction that is wanted.
    """
    all_tables = read_tables(checkpoint)
    starts: dict[str, Start] = {}
    notes: list[str] = []
    for direction in sorted({spec.bucketing.bidirectional for spec in wanted.values()}):
        names = [name for name, spec in wanted.items() if spec.bucketing.bidirectional == direction]
        sources = [table for table in all_tables if table.bucketing.bidirectional == direction]
        kind = "bidirectional" if direction else "causal"
        if not sources:
            if direction:
                raise ConfigError(
                    f"init='{FROM}{checkpoint}': its tables are causal and say nothing of the keys after the query, "
                    f"but {names[0]} is bidirectional; take a checkpoint with an encoder"
                )
            sources = all_tables
            notes.append("causal tables are the half for the keys before the query of bidirectional ones")
        if len(sources) not in (1, len(names)):
            notes.append(f"{kind}: layer i of {len(names)} takes the table of layer i * {len(sources)} // {len(names)}")
        worst: tuple[float, int, str] | None = None
        for number, name in enumerate(names):
            spec, source = wanted[name], sources[number * len(sources) // len(names)]
            changed = rebucket(source.table, source.bucketing, spec.bucketing, spec.context, source.slopes, spec.tail)
            at = int(changed.error.argmax())
            if worst is None or float(changed.error[at]) > worst[0]:
                worst = float(changed.error[at]), int(changed.offset[at]), name
            starts[name] = Start(changed.table, changed.slopes)
        old, new = sources[0].bucketing, wanted[names[0]].bucketing
        flattened = sources[0].slopes is not None and not wanted[names[0]].tail
        if old.num_buckets != new.num_buckets or old.max_distance != new.max_distance or flattened:
            assert worst is not None, "there is a name for each direction"
            notes.append(
                f"{kind}: {old.num_buckets} buckets to {old.max_distance} became {new.num_buckets} to "
                f"{new.max_distance}{', without the tail' if flattened else ''}; the bias changes most, by "
                f"{worst[0]:.3g}, at offset {worst[1]} of {worst[2]}"
            )
    return Reused({name: starts[name] for name in wanted}, notes)


def spread_heads(reused: Reused, wanted: Mapping[str, TableSpec]) -> Reused:
    """Give each wanted head the table of the head at the same height in the checkpoint."""
    starts, notes = {}, list(reused.notes)
    for name, spec in wanted.items():
        start, heads = reused.starts[name], spec.heads
        if (available := len(start.table)) != heads:
            kind = "bidirectional" if spec.bucketing.bidirectional else "causal"
            note = f"{kind}: head h of {heads} takes head h * {available} // {heads}"
            notes += [note] if note not in notes else []
        head = torch.arange(heads) * available // heads
        starts[name] = Start(start.table[head], None if start.slopes is None else start.slopes[head])
    return Reused(starts, notes)


def read_tables(checkpoint: str) -> list[Found]:
    """The tables of a retrofit or of a model of the T5 family, by layer; no other weight is read."""
    source = find(checkpoint)
    retrofit = source.settings.get("rpb_retrofit")
    if retrofit is not None:
        check_settings(retrofit, checkpoint)
    config = source.config()
    check_headers(source, config)
    stored, tails = _tensors(source, f"{TABLE}.weight"), _tensors(source, f"{TABLE}.tail")
    if retrofit is not None:
        buckets, distance = retrofit["relative_attention_num_buckets"], retrofit["relative_attention_max_distance"]
        both, first = len(retrofit["bidirectional"]) > 1, retrofit["bidirectional"][0]
        return [
            Found(
                name,
                table,
                Bucketing(buckets, distance, _is_encoder(name) if both else first),
                tails.get(name.replace(f"{TABLE}.weight", f"{TABLE}.tail")),
            )
            for name, table in stored.items()
        ]
    if not stored:
        raise ConfigError(
            f"init='{FROM}{checkpoint}': a '{source.settings.get('model_type')}' without tables of relative positions; "
            "take a retrofit or a model of the T5 family"
        )
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    return [
        Found(name, table.T.contiguous(), Bucketing(buckets, distance, _is_encoder(name)))
        for name, table in stored.items()
    ]


def _is_encoder(name: str) -> bool:
    return "decoder" not in name.split(".")


def _tensors(source: Source, ending: str) -> dict[str, Tensor]:
    all_tables: dict[str, Tensor] = {}
    for shard in source.shards:
        with safe_open(shard, framework="pt") as file:
            all_tables |= {name: file.get_tensor(name).float() for name in file.keys() if name.endswith(ending)}
    for name, tensor in all_tables.items():
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"init='{FROM}{source.name}': {name} holds NaN or infinity: a damaged checkpoint")

    def layer(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]

    return dict(sorted(all_tables.items(), key=lambda item: layer(item[0])))
