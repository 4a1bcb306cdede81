"""What is beside OUT: only what this program made, for this command, and nobody holds, is ever removed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from rpb_retrofit.errors import CheckpointError
from rpb_retrofit.files import spool as spool_module
from rpb_retrofit.files.claim import MARK, Claim, NotMarkedError
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.spool import Spool
from rpb_retrofit.files.work import WorkFolder
from rpb_retrofit.training.checkpoints import RunFolder
from tests.support.command import rpb_command
from tests.support.training_cases import PROSE, write_retrofit, write_source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its retrofit and two texts."""
    folder = tmp_path_factory.mktemp("models")
    write_retrofit(write_source(folder / "source"), folder / "retrofit")
    (folder / "text.txt").write_text(PROSE[:8000])
    (folder / "fitted.txt").write_text(PROSE[8000:16000])
    return folder


def command(name: str, models: Path, out: Path) -> list[object]:
    """A command that writes ``out``, and keeps what it needs to go on beside it."""
    text = ("--data", models / "text.txt")
    match name:
        case "finetune":
            return [name, models / "retrofit", out, *text]
        case "diagnose":
            return [name, models / "retrofit", "--out", out, *text, "--lengths", "32", "--tokens", "64"]
    sizes = ("--target-length", "64", "--tokens", "64", "--calibration-tokens", "64", "--calibration-length", "32")
    return [name, models / "source", "--out", out, *text, "--calibration", models / "fitted.txt", *sizes]


def plain(out: Path) -> Path:
    """A folder of the user's that has the name."""
    folder = out.with_name("out.run")
    folder.mkdir()
    (folder / "thesis.txt").write_text("x")
    return folder


def empty(out: Path) -> Path:
    folder = out.with_name("out.run")
    folder.mkdir()
    return folder


def linked(out: Path) -> Path:
    """A link to a folder of the user's, which even has the mark."""
    target = out.with_name("elsewhere")
    target.mkdir()
    (target / "thesis.txt").write_text("x")
    Claim.make(target, "rpb finetune").release()
    out.with_name("out.run").symlink_to(target)
    return target


def of_another_command(out: Path) -> Path:
    """An interrupted run of a command that is none of those that are tried."""
    folder = empty(out)
    Claim.make(folder, "rpb dream").release()
    (folder / "stage-2.checkpoints").mkdir()
    (folder / "stage-2.checkpoints" / "step-5").write_text("hours of work")
    return folder


def marked_by_hand(out: Path) -> Path:
    folder = plain(out)
    (folder / MARK).write_text('{"program": "another"}')
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["finetune", "diagnose", "compare"])
@pytest.mark.parametrize("make", [plain, empty, linked, of_another_command, marked_by_hand])
def test_what_others_made_stays(
    name: str,
    make: Callable[[Path], Path],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "out"
    users = make(out)
    before, names = snapshot(users), sorted(tmp_path.iterdir())
    assert rpb_command(monkeypatch, *command(name, models, out)) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"'{tmp_path / 'out.run'}' is in the way of rpb {name}: " in last_line and "choose another OUT" in last_line
    assert snapshot(users) == before and sorted(tmp_path.iterdir()) == names


def test_a_refused_finetune_leaves_the_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused for its text, it once took the folder with it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "empty.txt").write_text("")
    users = plain(tmp_path / "out")
    arguments = ("finetune", models / "retrofit", tmp_path / "out", "--data", tmp_path / "empty.txt")
    assert rpb_command(monkeypatch, *arguments) == 2
    assert (users / "thesis.txt").exists()
    users.rename(tmp_path / "moved")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert rpb_command(monkeypatch, *arguments) == 2
    assert "holds no text" in capsys.readouterr().err and not (tmp_path / "out.run").exists()


def test_a_live_run_is_left_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another command or of the same: what it holds stays, and it goes on."""
    run = RunFolder(tmp_path / "out")
    assert run.open({"recipe": 1}, restart=False) is False
    (run.path / "stage-1.checkpoints").mkdir()
    before = snapshot(run.path)
    for name, message in (("diagnose", "it was made for rpb finetune"), ("finetune", "is in use by another run")):
        AcceleratorState._reset_state(reset_partial_state=True)
        if name == "diagnose":
            run.release()  # interrupted
        else:
            run.take()
        assert rpb_command(monkeypatch, *command(name, models, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err
        assert snapshot(run.path) == before and (run.path / "stage-1.checkpoints").is_dir()
    run.release()


def test_links_inside_are_not_followed(tmp_path: Path) -> None:
    """A run that somebody else packed must not write through links, nor remove through them."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "thesis.txt").write_text("x")
    for name in ("stage-1", "run.json", ".run.json.partial", "logs"):
        folder = RunFolder(tmp_path / name)
        folder.take()
        folder.release()
        (folder.path / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=f"{name}' is a link, which rpb finetune did not make"):
            folder.open({}, restart=True)
    assert (target / "thesis.txt").read_text() == "x"
    mark = tmp_path / "marked.run"
    mark.mkdir()
    (mark / MARK).symlink_to(target / "thesis.txt")
    with pytest.raises(CheckpointError, match="was not made by this program"):
        RunFolder(tmp_path / "marked").take()


def test_what_is_put_into_a_run_stays(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "out.run", "rpb finetune", ("stage-*",))
    folder.take()
    (folder.path / "stage-1").mkdir()
    (folder.path / "notes.txt").write_text("x")
    folder.remove()
    assert [file.name for file in folder.path.iterdir()] == ["notes.txt"]


# --- folders that appear whole ---------------------------------------------------------------------------------------


def test_partial_folders_of_others_stay(tmp_path: Path) -> None:
    """Whatever they are called; and glob's signs in a name are no pattern."""
    for name in ("7", "999999999", "0123456789abcdef", "thesis"):
        folder = tmp_path / f".out.partial-{name}"
        folder.mkdir()
        (folder / "thesis.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    Claim.make(tmp_path / "elsewhere", "a folder in the making").release()
    (tmp_path / ".out.partial-aaaaaaaaaaaaaaaa").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())
    for name in ("out", "*", "o?t", "[o]ut"):
        with whole_folder(tmp_path / name) as part:
            (part / "made").touch()
    made = {tmp_path / name for name in ("out", "*", "o?t", "[o]ut")}
    assert sorted(set(tmp_path.iterdir()) - made) == before
    assert {file.name for folder in made for file in folder.iterdir()} == {"made"}
    assert (tmp_path / "elsewhere").is_dir()


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def write_slowly(out: Path, started: Any) -> None:
    with whole_folder(out) as part:
        (part / "weights").write_text("x")
        started.set()
        time.sleep(60)


@pytest.mark.process
def test_a_lock_not_a_process_id(tmp_path: Path) -> None:
    """Two at once leave each other alone, also where neither sees the other's process, as in two containers; what a
    killed one left goes with the next, also where its process id was given out again."""
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=write_slowly, args=(tmp_path / "out", started))
    process.start()
    assert started.wait(60)
    (part,) = tmp_path.glob(".out.partial-*")
    assert not any(str(number) == part.name.rpartition("-")[2] for number in (process.pid, os.getpid()))
    with whole_folder(tmp_path / "out"):
        assert (part / "weights").exists(), "it is still being written"
    (tmp_path / "out").rmdir()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert part.exists()
    with whole_folder(tmp_path / "out"):
        assert not part.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_claims(tmp_path: Path) -> None:
    claim = Claim.make(tmp_path, "this")
    with pytest.raises(BlockingIOError):
        Claim.take(tmp_path, "this")
    claim.release()
    with pytest.raises(NotMarkedError, match="it was made for this"):
        Claim.take(tmp_path, "that")
    Claim.take(tmp_path, "this").unmark()
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotMarkedError, match="not made by this program"):
        Claim.take(tmp_path, None)


@pytest.mark.parametrize("mark", ["", "{", "[]", '"rpb_retrofit"', '{"program": "rpb_retrofit"}', "[" * 4000])
def test_marks_that_are_none(mark: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(mark)
    with pytest.raises(NotMarkedError, match="not made by this program"):
        Claim.take(tmp_path, None)


@pytest.mark.process
@pytest.mark.parametrize("early", [True, False])
def test_no_folder_for_temporary_files(early: bool, models: Path, tmp_path: Path) -> None:
    """Neither TMPDIR nor anything that Python falls back to, from the start, where PyTorch's import fails, or later."""
    nowhere = f"import tempfile; tempfile.tempdir = None; tempfile._candidate_tempdir_list = lambda: ['{tmp_path}/no']"
    words = ["rpb", "retrofit", str(models / "source"), str(tmp_path / "out")]
    script = [f"import sys; sys.argv = {words}", "" if early else "import torch, transformers, datasets", nowhere]
    script.append("from rpb_retrofit.cli.main import main; main()")
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True)
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("rpb: no temporary files can be written") and "set TMPDIR to a folder" in last_line, (
        done.stderr
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_full_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool_module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\): set TMPDIR"):
        Spool(tmp_path)["source", 0] = (torch.zeros(1),)


def test_the_mark_says_who(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.take()
    assert json.loads((folder.path / MARK).read_text()) == {"program": "rpb_retrofit", "purpose": "rpb finetune"}
    folder.remove()
    assert not list(tmp_path.iterdir())
