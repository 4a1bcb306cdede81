"""What users install: the source distribution, the wheel made of it, and its commands, all without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rpb_retrofit.runtime.modeling import RUNTIME_FILES
from rpb_retrofit.version import __version__

pytestmark = [pytest.mark.slow, pytest.mark.process]

ROOT = Path(__file__).parents[1]
FOLDERS = ("rpb_retrofit", "model_cards", "scripts", "tests")
ALONE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """What a process prints that sees ``path`` and the installed packages, and nothing of this repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ALONE
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries = [str(path or ""), *(entry for entry in inherited if Path(entry).resolve() != ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in entries if entry)
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of what the repository tracks."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "copy"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=copy)
    return folder / f"rpb_retrofit-{__version__}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, installed."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_source_distribution_is_whole(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "constraints.txt",
        "pyproject.toml",
    }
    assert top <= names
    assert {"model_cards/README.md", "model_cards/costs.svg", "scripts/tour.ipynb", "tests/conftest.py"} <= names


def test_the_wheel_holds_what_runs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "rpb_retrofit"
    data = [file for pattern in ("*/templates/*", "cards/template.md", "py.typed") for file in package.glob(pattern)]
    wanted = [*package.rglob("*.py"), *data]
    assert len(data) >= 7
    assert {str(file.relative_to(ROOT)) for file in wanted} == {n for n in names if n.startswith("rpb_retrofit/")}
    assert {f"rpb_retrofit/runtime/{name}" for name in RUNTIME_FILES} <= names
    assert {name.partition("/")[0] for name in names} == {"rpb_retrofit", f"rpb_retrofit-{__version__}.dist-info"}
    assert f"rpb_retrofit-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_commands_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import rpb_retrofit; print(rpb_retrofit.__file__)", cwd=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    rpb = installed / "bin" / "rpb"
    helped = run(rpb, "--help", cwd=tmp_path, path=installed)
    for name in ("retrofit", "finetune", "evaluate", "diagnose", "compare", "card", "explain", "demo"):
        assert name in helped
    assert run(rpb, "--version", cwd=tmp_path, path=installed).strip() == __version__
    told = run(rpb, "explain", "--query", "5", "--key", "9", cwd=tmp_path, path=installed)
    assert "offset -4" in told
    assert "--out" in run(rpb, "demo", "--help", cwd=tmp_path, path=installed)


def test_a_wheel_writes_checkpoints_that_run_alone(installed: Path, tmp_path: Path) -> None:
    """The runtime that travels is the installed one, README and caches left behind."""
    script = """
import torch, transformers, rpb_retrofit as rpb
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=2))
rpb.retrofit(model, rpb.RetrofitConfig(init="zeros"))
model.save_pretrained("out")
"""
    run(sys.executable, "-c", script, cwd=tmp_path, path=installed)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert set(RUNTIME_FILES) <= files
    assert "README.md" not in files
