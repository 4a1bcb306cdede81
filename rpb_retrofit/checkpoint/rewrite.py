"""Writing changed weights into the shards of a checkpoint: only their bytes, in the files that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.shards import overwrite


class Change(NamedTuple):
    """A weight before and after, as the model holds it."""

    before: Tensor
    after: Tensor


def rewrite(folder: Path, weight_map: Mapping[str, str], changes: Mapping[str, Change]) -> list[str]:
    """Write the changed weights of a model, by their names there, into the shards in ``folder``; which those are.

    A checkpoint may name a weight otherwise than the model does (it leaves out, or adds, the name of the model in the
    model), so a tensor counts as the weight if it has the same bits, too. CheckpointError where none has: some
    checkpoints keep several weights in one tensor.
    """
    by_file: dict[str, dict[str, bytes]] = defaultdict(dict)
    for name, change in changes.items():
        alike = ((key, _same(folder / weight_map[key], key, change)) for key in _candidates(name, weight_map))
        stored, dtype = next(((key, dtype) for key, dtype in alike if dtype is not None), (None, None))
        if stored is None:
            raise CheckpointError(
                f"'{name}' is changed by what is folded into it, but the checkpoint holds no tensor like it: "
                "retrofit the model in Python and save it, or leave --calibrate tables+content and --scale out"
            )
        content = change.after.detach().cpu().to(dtype).contiguous()
        by_file[weight_map[stored]][stored] = content.view(torch.uint8).numpy().tobytes()
    for shard, tensors in by_file.items():
        overwrite(folder / shard, tensors)
    return sorted(by_file)


def _candidates(name: str, weight_map: Mapping[str, str]) -> list[str]:
    """The name itself first, then those that end with it or are its end."""
    alike = [key for key in weight_map if key != name and (key.endswith(f".{name}") or name.endswith(f".{key}"))]
    return ([name] if name in weight_map else []) + alike


def _same(shard: Path, key: str, change: Change) -> torch.dtype | None:
    """The dtype of a stored tensor that is the weight before its change; None for any other."""
    with safe_open(shard, framework="pt") as file:
        stored = file.get_tensor(key)
    before = change.before.cpu()
    same = stored.shape == before.shape and torch.equal(stored.to(before.dtype), before)
    return stored.dtype if same else None
