"""Small models to diagnose: their measurements on the language, and the retrofits that are healthy."""

from __future__ import annotations

from typing import Any

from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.finding import Verdict
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.result import Diagnosis
from rpb_retrofit.runtime.anatomy import submodels
from rpb_retrofit.tables.checksums import KEY
from tests.diagnosis.small_model import language

LENGTHS = (64, 256)


def measurements_of(arms: Arms, lengths: tuple[int, ...] = LENGTHS, text: Any = language, **plan: Any) -> Measurements:
    plan = {"lengths": lengths, "tokens": 8192, "rounds": 0, **plan}
    return Measurements(arms, [text(8192, 4321)], None, DiagnosisPlan(**plan))


def verdicts(diagnosis: Diagnosis) -> dict[str, Verdict]:
    return {outcome.name: outcome.finding.verdict for outcome in diagnosis.outcomes}


def forget_checksums(model: Any) -> None:
    """As a retrofit of an older version, or one whose tables a training of another kind changed."""
    settings = {key: value for key, value in model.config.rpb_retrofit.items() if key != KEY}
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = settings


HEALTHY: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 0, {}),
    ("llama", 0, {"seed": 31}),
    ("llama", 0, {"keep": 4}),
    ("llama", 0, {"scale": "unscaled"}),
    ("llama", 0, {"tail": "log", "max_distance": 64}),
    ("llama", 1, {}),
    ("qwen2", 0, {}),
    ("qwen2", 1, {"keep": 4}),
    ("gpt_neox", 0, {}),
    ("gpt_neox", 1, {"seed": 31}),
    ("gpt2", 0, {}),
    ("gpt2", 1, {}),
]
