"""The releases of Transformers that this code runs on. Importing this module raises ReleaseError on an older one."""

from __future__ import annotations

import re

import transformers

from .errors import ReleaseError

OLDEST = (5, 17)
"""Major and minor number of the first release that this code was found to compute right on: scripts/check_lock.py."""


def check_release(installed: str, needed: tuple[int, int] = OLDEST) -> None:
    """ReleaseError where the installed release of Transformers is older than the needed one."""
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < needed:
        release = ".".join(map(str, needed))
        raise ReleaseError(
            f"this rpb_retrofit checkpoint needs Transformers {release} or later, and {installed} is installed: "
            f"pip install 'transformers>={release}'"
        )


check_release(transformers.__version__)
