"""rpb_retrofit: swap the positional mechanism of a pretrained Transformers model for T5's relative position bias."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rpb_retrofit.version import __version__

if TYPE_CHECKING:
    from rpb_retrofit.checkpoint.load import load
    from rpb_retrofit.comparison.compare import compare
    from rpb_retrofit.comparison.result import ComparisonResult
    from rpb_retrofit.config import RetrofitConfig
    from rpb_retrofit.diagnosis.diagnose import diagnose
    from rpb_retrofit.diagnosis.result import Diagnosis
    from rpb_retrofit.evaluation.evaluate import EvaluationResult, evaluate
    from rpb_retrofit.swap.inplace import retrofit, revert
    from rpb_retrofit.swap.report import RetrofitReport

__all__ = [
    "ComparisonResult",
    "Diagnosis",
    "EvaluationResult",
    "RetrofitConfig",
    "RetrofitReport",
    "__version__",
    "compare",
    "diagnose",
    "evaluate",
    "load",
    "retrofit",
    "revert",
]

_HOME = {
    "ComparisonResult": "rpb_retrofit.comparison.result",
    "Diagnosis": "rpb_retrofit.diagnosis.result",
    "EvaluationResult": "rpb_retrofit.evaluation.evaluate",
    "RetrofitConfig": "rpb_retrofit.config",
    "RetrofitReport": "rpb_retrofit.swap.report",
    "compare": "rpb_retrofit.comparison.compare",
    "diagnose": "rpb_retrofit.diagnosis.diagnose",
    "evaluate": "rpb_retrofit.evaluation.evaluate",
    "load": "rpb_retrofit.checkpoint.load",
    "retrofit": "rpb_retrofit.swap.inplace",
    "revert": "rpb_retrofit.swap.inplace",
}


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import: `rpb --help` and `rpb explain` do without it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
