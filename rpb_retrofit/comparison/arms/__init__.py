"""The arms, one file each. A new one is a file with an ``ARM``, and its row here."""

from __future__ import annotations

import difflib

from rpb_retrofit.comparison.arm import Arm
from rpb_retrofit.comparison.arms import (
    alibi,
    base,
    dynamic,
    interpolated,
    linear,
    llama3,
    longrope,
    none,
    none_log_n,
    ntk,
    source,
    t5,
    t5_alibi,
    t5_content,
    t5_kept,
    t5_kept_log,
    t5_log,
    t5_normal,
    t5_zeros,
    yarn,
)
from rpb_retrofit.errors import ConfigError

ARMS: dict[str, Arm] = {
    module.ARM.name: module.ARM
    for module in (
        *(source, linear, dynamic, ntk, base, yarn, longrope, llama3, interpolated),
        *(alibi, none, none_log_n),
        *(t5_zeros, t5_normal, t5_alibi, t5, t5_log, t5_content, t5_kept, t5_kept_log),
    )
}
"""By name, the source first."""


def parse(text: str) -> tuple[Arm, float | None]:
    """``yarn`` or ``yarn:4``: the arm, and the number behind it. ConfigError for what is neither."""
    name, colon, number = text.strip().partition(":")
    if (arm := ARMS.get(name)) is None:
        close = difflib.get_close_matches(name, ARMS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(ARMS)}"
        raise ConfigError(f"arm '{name}': there is none of that name; {hint}")
    if not colon:
        if arm.needed:
            raise ConfigError(f"arm '{name}': it takes a number, {arm.number}, as in '{name}:500000'")
        return arm, None
    if not arm.number:
        raise ConfigError(f"arm '{text}': '{name}' takes no number")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"arm '{text}': '{number}' is no {arm.number} above 0")
    return arm, value
