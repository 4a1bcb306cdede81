"""The command line as a process: streams that are closed or full, pipes that break, an interrupt while it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from rpb_retrofit.cli import standard_streams
from tests.support.command import RPB

pytestmark = pytest.mark.process


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line in a shell, where ``rpb`` is this one."""
    rpb = " ".join(f"'{word}'" for word in RPB)
    return subprocess.run(
        ["bash", "-c", f'rpb() {{ {rpb} "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "environment", "status", "error"),
    [
        ("rpb explain 2>&-", {}, 0, ""),
        ("rpb explain --query 1 2>&-", {}, 2, ""),
        ("rpb explain >&- 2>&- <&-", {}, 0, ""),
        ("rpb explain", {"PYTHONIOENCODING": "ascii"}, 0, ""),
        ("rpb explain >/dev/full", {}, 2, "rpb: the system refused: No space left"),
        ("rpb explain --query 3", {"RANK": "1", "PYTHONIOENCODING": "ascii"}, 2, "rpb: --key is missing"),
        ("rpb explain --query 1 --key $'\\xff'", {}, 2, "rpb: Invalid value for '--key'"),
        ("rpb explain 2>/dev/full | head -c 1 >/dev/null; (exit ${PIPESTATUS[0]})", {}, 141, ""),
    ],
)
def test_streams(command: str, environment: dict[str, str], status: int, error: str) -> None:
    done = shell(command, **environment)
    assert done.returncode in ({status, 0} if status == 141 else {status}), done.stderr
    assert done.stderr.startswith(error) and len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stdout + done.stderr
    if environment.get("PYTHONIOENCODING") == "ascii" and status == 0:
        assert "#" in done.stdout and "\\u" not in done.stdout


def test_an_early_interrupt() -> None:
    """From the first line of ours on; before it Python itself is starting, and answers in its own way."""
    for delay in (0.0, 0.02, 0.1, 0.5):
        process = subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); from rpb_retrofit.cli import main; main()", "explain"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        if delay:
            assert b"Traceback" not in error, error
            assert process.returncode in (0, 130, -signal.SIGINT)


def test_closed_streams_are_opened() -> None:
    code = (
        "import os, sys; os.close(2); sys.stderr = None\n"
        "from rpb_retrofit.cli import standard_streams\n"
        "standard_streams.open_all()\n"
        "assert os.path.samestat(os.fstat(2), os.stat(os.devnull)); assert sys.stderr is not None\n"
        "assert open(sys.executable, 'rb').fileno() > 2\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert standard_streams.STREAMS[2] == ("stderr", "w")
