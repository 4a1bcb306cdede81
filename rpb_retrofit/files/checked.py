"""What a file must hold to be what a command of this project wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.json_file import read_object


class Written(BaseModel):
    """Some keys of a file; it may have others."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


Kind = TypeVar("Kind", bound=Written)


def checked(file: Path, kind: type[Kind], writer: str) -> dict[str, Any]:
    """The JSON object in a file, whose keys are as ``kind`` says. CheckpointError where it is not what the command
    ``writer`` writes; it names the first key that is wrong."""
    return check(read_object(file), file, kind, writer)


def check(content: dict[str, Any], file: Path, kind: type[Kind], writer: str) -> dict[str, Any]:
    """The same of an object that was read already."""
    try:
        kind.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"'{file}' is not what `{writer}` writes: {where}: {first['msg']}") from error
    return content
