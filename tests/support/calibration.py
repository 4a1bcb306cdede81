"""What tests of calibration share: the config, the families with something to fit, and text as random tokens."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rpb_retrofit.runtime.families import family_of
from tests.families.cases import CASES
from tests.support.tiny_models import CONFIG, build, tokens

CALIBRATED = replace(CONFIG, init="calibrated")
FITTED = [case for case in CASES if case.family not in ("t5", "umt5")]
ROTARY = [case for case in FITTED if family_of(build(case).config).mechanism == "rope"]


def calibration_windows(length: int = 48, windows: int = 2) -> list[Tensor]:
    """One batch of ids (windows, length) int64."""
    return [tokens(windows, length, seed=5)]
