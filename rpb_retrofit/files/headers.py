"""Whether a checkpoint holds what a model of its config must have: told from its files' headers, without a weight.

Transformers itself is asked, by letting it load tensors without content: it knows each family's other names for them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rpb_retrofit.errors import CheckpointError, RetrofitError
from rpb_retrofit.files.printable import first_of, message_of
from rpb_retrofit.files.shards import read_header
from rpb_retrofit.files.source import Source, model_class

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}


def check_headers(source: Source, config: Any) -> list[str]:
    """Names of tensors that the model of ``config`` has no use for: Transformers ignores them.

    Raises CheckpointError where a tensor is missing or has another shape, or holds no floating-point numbers where the
    model has some, and where no model can be made of the config.
    """
    dtypes: dict[str, str] = {}
    empty: dict[str, Tensor] = {}
    for shard in source.shards:
        for name, entry in read_header(shard).items():
            if name != "__metadata__":
                dtypes[name] = entry["dtype"]
                empty[name] = _without_content(entry)
    source.check_layers(len(empty))
    _, info = _load(source, config, empty)
    _check_report(source, info)
    if any(dtype not in _FLOATS for dtype in dtypes.values()):
        _check_dtypes(source, config, empty, dtypes)
    return sorted(info["unexpected_keys"])


def _check_report(source: Source, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"'{source.name}' lacks {len(missing)} of its weights ({first_of(missing)}): a damaged checkpoint, or a "
            "config.json that is not its own"
        )
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"'{source.name}': {key} has shape {tuple(stored)}, its config.json asks for {tuple(expected)}: one of the "
            "two is not this model's"
        )


def _check_dtypes(source: Source, config: Any, empty: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> None:
    """A weight of integers would be cast without a word: what goes missing without them must be theirs to hold."""
    floating = {name: tensor for name, tensor in empty.items() if dtypes[name] in _FLOATS}
    kinds = ", ".join(sorted({*dtypes.values()} - _FLOATS.keys()))
    try:
        model, info = _load(source, config, floating)
        held = model.state_dict()
        wrong = sorted(key for key in info["missing_keys"] if held[key].is_floating_point())
    except RetrofitError:  # what is missing from a retrofit is an error at once
        wrong = sorted(empty.keys() - floating.keys())
    if wrong:
        raise CheckpointError(
            f"'{source.name}': {wrong[0]} is stored as {kinds}, and the model has floating-point numbers there: take "
            "the unquantised checkpoint"
        )


def _load(source: Source, config: Any, empty: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """The class that ``config`` names with these tensors for its weights, and what Transformers says of them."""
    from rpb_retrofit.runtime.modeling import retrofit_class

    plain = model_class(config)
    wanted = plain if getattr(config, "rpb_retrofit", None) is None else retrofit_class(plain)
    try:
        loaded: Any = wanted.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=dict(empty),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        return loaded
    except RetrofitError:
        raise
    except Exception as error:  # whatever a class makes of a config, or a conversion of too few tensors
        raise CheckpointError(
            f"'{source.name}': its config.json and its weights make no {wanted.__name__}: {message_of(error)}"
        ) from error


def _without_content(entry: Mapping[str, Any]) -> Tensor:
    import torch

    name = _FLOATS.get(entry["dtype"]) or _OTHERS.get(entry["dtype"], "uint8")  # what is smaller still is no weight
    return torch.empty(entry["shape"], dtype=getattr(torch, name), device="meta")
