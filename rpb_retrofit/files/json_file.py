"""JSON files: read from whoever wrote them, as an object or an error in one line; written for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files.printable import message_of, reason_of


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError where the file cannot be read, or holds something else."""
    if file.exists() and not file.is_file() and not file.is_dir():  # of a folder, the system says so itself
        raise CheckpointError(f"'{file}' is no file")  # a named pipe would be waited for
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be read: {reason_of(error)}") from error
    except RecursionError as error:
        raise CheckpointError(f"'{file}' is nested too deeply to be read as JSON") from error
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not JSON: {message_of(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file}' is not a JSON object")
    return content


def save_json(file: Path, content: Any) -> None:
    """Write JSON, indented, in UTF-8. OSError where that fails."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
