"""What was measured, kept on disk, so that an interrupted examination goes on after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from rpb_retrofit.errors import CheckpointError, ConfigError

Result = TypeVar("Result")
IDENTITY = "identity.json"


class Journal:
    """Measurements by name: each taken once, and read from the folder where an earlier run left it there."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.held = folder, dict[str, Any]()

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> Journal:
        """The journal in a folder, which is made. ConfigError where it holds an examination of something else."""
        file = folder / IDENTITY
        try:
            if file.exists():
                before = json.loads(file.read_text())
                if different := [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]:
                    raise ConfigError(
                        f"'{folder}' holds an examination with other {', '.join(different)}: remove it, or choose "
                        "another --out"
                    )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                _whole(file, lambda part: part.write_text(json.dumps(identity, indent=2) + "\n"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"'{folder}' cannot be used: {error}; choose another --out") from error
        return cls(folder)

    def __call__(self, name: str, measure: Callable[[], Result]) -> Result:
        """The measurement ``name``: taken now, unless it was taken before."""
        if name not in self.held:
            file = None if self.folder is None else self.folder / f"{name}.pt"
            if file is not None and file.exists():
                self.held[name] = torch.load(file, weights_only=False)  # written by this program
            else:
                self.held[name] = found = measure()
                if file is not None:
                    _whole(file, lambda part: torch.save(found, part))
        return self.held[name]

    def remove(self) -> None:
        """The folder goes: what it held is in the report."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _whole(file: Path, write: Callable[[Path], Any]) -> None:
    part = file.with_suffix(".part")
    write(part)
    part.rename(file)
