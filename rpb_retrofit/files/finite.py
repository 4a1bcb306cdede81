"""Whether weights are numbers at all: what is fitted to NaN is NaN, and says so nowhere."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import first_of
from rpb_retrofit.files.shards import data_start, read_header

if TYPE_CHECKING:
    from torch import Tensor

_EXPONENTS = {
    "F64": (numpy.uint64, 0x7FF0 << 48),
    "F32": (numpy.uint32, 0x7F80 << 16),
    "F16": (numpy.uint16, 0x7C00),
    "BF16": (numpy.uint16, 0x7F80),
}
"""The bits that are all set in NaN and infinity, by dtype, and the integers of that size."""

_PIECE = 4 << 20
"""Bytes of a file that are looked at together."""


def check_finite(parameters: Mapping[str, Tensor], name: str) -> None:
    """CheckpointError names the parameters of ``name`` that hold NaN or infinity; those without content are skipped.

    Asks for the smallest and the largest number only, which takes no memory beside the weights.
    """
    _refuse(
        [
            key
            for key, value in parameters.items()
            if not value.is_meta
            and value.numel()
            and value.is_floating_point()
            and not all(bool(end.isfinite()) for end in value.detach().aminmax())
        ],
        name,
    )


def check_stored(shards: Iterable[Path], name: str, unused: Container[str]) -> None:
    """CheckpointError names the tensors in the safetensors files of ``name`` that hold NaN or infinity, but for those
    that are ``unused``. They are told from their bytes, of which few are in memory at a time."""
    _refuse([key for shard in shards for key in _not_finite(shard) if key not in unused], name)


def _refuse(wrong: Sequence[str], name: str) -> None:
    if wrong:
        raise CheckpointError(
            f"'{name}': {len(wrong)} of its weights hold NaN or infinity ({first_of(wrong)}): a damaged "
            "checkpoint, fetch it again"
        )


def _not_finite(path: Path) -> Iterator[str]:
    """The tensors in a safetensors file that hold NaN or infinity."""
    header = read_header(path)
    with path.open("rb") as file:
        start = data_start(file)
        for name, entry in header.items():
            if name == "__metadata__" or entry["dtype"] not in _EXPONENTS:
                continue
            kind, mask = _EXPONENTS[entry["dtype"]]
            first, last = entry["data_offsets"]
            file.seek(start + first)
            for at in range(first, last, _PIECE):
                bits = numpy.frombuffer(file.read(min(_PIECE, last - at)), kind)
                if bool(((bits & kind(mask)) == kind(mask)).any()):
                    yield name
                    break
