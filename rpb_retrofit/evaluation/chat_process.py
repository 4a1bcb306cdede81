"""The process that renders chat templates for `rpb_retrofit.evaluation.chat`: a line of JSON in, one out."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

READY = b"ready"

MEMORY = 512 * 2**20
"""Bytes that a template may take beside what the process has when it is ready."""

CPU_SECONDS = 60
"""Of the whole process, should whoever started it be gone."""

LONGEST = 2**20
"""Characters of a rendered prompt."""


def main() -> None:
    """Answer until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with contextlib.suppress(OSError, ValueError):  # of Linux only; the other limits hold elsewhere
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = sys.stdout.buffer
    answers.write(READY + b"\n")
    answers.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            turn = {"role": "user", "content": asked["message"]}
            rendered: Any = render_jinja_template(
                [[turn]], chat_template=asked["template"], add_generation_prompt=True, **asked["special"]
            )
            text = rendered[0][0]
            if len(text) > LONGEST:
                raise ValueError(f"it makes {len(text):,} characters of a short question")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY // 2**20} MB"}
        except Exception as error:  # whatever a template can raise is a sentence about it
            answer = {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
