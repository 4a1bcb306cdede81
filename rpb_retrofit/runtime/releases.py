"""The releases of Transformers that this code runs on. Importing this module raises ReleaseError on an older one."""

from __future__ import annotations

import re

import transformers

from .errors import ReleaseError

OLDEST = (5, 10)
"""Major and minor number of the first release on which every family computes what it should: scripts/check_lock.py."""


def check_release(installed: str) -> None:
    """ReleaseError where the installed release of Transformers is older than `OLDEST`."""
    numbers = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if numbers < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ReleaseError(
            f"rpb_retrofit, which this checkpoint was made with, needs Transformers {needed} or later, and {installed} "
            f"is installed: pip install 'transformers>={needed}'"
        )


check_release(transformers.__version__)
