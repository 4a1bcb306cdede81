"""A checkpoint's chat template, rendered where it can do no harm.

A template is a program that came with the model. Transformers' sandbox keeps it from files and from Python's inside,
but not from loops without end or from text without end; so it runs in a process with little memory and time.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import time
from typing import Any

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.chat_process import READY
from rpb_retrofit.files.printable import shortened

STARTS, SECONDS = 60.0, 4.0
"""Seconds that the process may take to start (an import of Transformers' utilities), and then to render a prompt."""

LONGEST_ANSWER = 2**23
"""Bytes of an answer of the process."""


def render(tokenizer: Any, message: str) -> str:
    """A user's ``message`` and the beginning of the reply, as the tokenizer's chat template has them.

    Raises DataError where the template fails, takes more than `SECONDS`, or too much memory.
    """
    try:
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise TypeError(f"it is a {type(template).__name__}, not text")
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        answer = _process.answer({"template": template, "message": message, "special": special})
        if "error" in answer:
            raise ValueError(answer["error"])
    except Exception as error:  # whatever can stand in a checkpoint's files is a sentence about them
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise DataError(
            f"the chat template of '{name}' cannot be used: {shortened(str(error), 500)}; repair it, or take "
            "chat_template out of the tokenizer's files: then plain prompts are asked"
        ) from error
    return answer["text"]


class _Process:
    """The process, started when it is first needed and again after it was stopped."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What it answers. ValueError or OSError, in words for a user, where it does not; it is stopped then."""
        try:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            return json.loads(self._line(process, SECONDS))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it."""
        process, self._running = self._running, None
        if process is not None:
            process.kill()
            process.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._running.poll() is not None:
            self.stop()
            self._running = subprocess.Popen(
                [sys.executable, "-P", "-m", "rpb_retrofit.evaluation.chat_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us to answer
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            if self._line(self._running, STARTS).strip() != READY:
                raise ValueError("the process that renders it did not start")
        return self._running

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """A line that it writes within so many seconds."""
        end, line, pipe = time.monotonic() + seconds, bytearray(), process.stdout
        assert pipe is not None
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise ValueError(f"a prompt of a few lines takes more than {seconds:g} seconds")
                part = os.read(pipe.fileno(), 2**16)
                if not part:
                    raise ValueError("a prompt of a few lines takes too much memory or time, and was stopped")
                line += part
                if len(line) > LONGEST_ANSWER:
                    raise ValueError(f"it makes more than {LONGEST_ANSWER:,} bytes of a few lines")
        return bytes(line)


_process = _Process()
atexit.register(_process.stop)
