"""The hypotheses, each a file: what it says, what it would predict, and the probe that tests it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from rpb_retrofit.diagnosis.finding import CauseKind, Finding, Outcome, unknown
from rpb_retrofit.diagnosis.hypotheses import (
    attention_spreads,
    bias_dropped,
    cached_decoding,
    computes_otherwise,
    does_not_run,
    domain_drift,
    far_order_lost,
    foreign_tables,
    heads_lost,
    local_order_lost,
    mechanism_active,
    not_deterministic,
    not_finite,
    not_fitted,
    off_by_one,
    offset_reversed,
    other_buckets,
    other_temperature,
    outside_trained_length,
    padding_or_packing,
    position_scaling,
    precision,
    retrieval_lost,
    sees_the_future,
    settings_differ,
    short_context_forgotten,
    tables_not_loaded,
    tables_shared,
    untrained_buckets,
    weights_differ,
    wrong_order,
    wrong_scale,
)
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import message_of


@dataclass(frozen=True)
class Hypothesis:
    """One file of this folder. ``name`` is the file's."""

    name: str
    cause: str
    predicts: str
    kind: CauseKind
    examine: Callable[[Measurements], Finding]

    def __call__(self, measurements: Measurements) -> Outcome:
        """Test it. Where that is not possible, say why."""
        try:
            finding = self.examine(measurements)
        except Exception as error:  # whatever a model raises that is at fault
            finding = replace(unknown(f"{type(error).__name__}: {message_of(error)}"), failed=True)
        return Outcome(self.name, self.cause, self.predicts, self.kind, finding)


def _hypothesis(module: ModuleType) -> Hypothesis:
    name = module.__name__.rpartition(".")[2]
    return Hypothesis(name, module.CAUSE, module.PREDICTS, module.KIND, module.examine)


HYPOTHESES = [
    _hypothesis(module)
    for module in (
        not_finite,
        not_deterministic,
        precision,
        bias_dropped,
        mechanism_active,
        offset_reversed,
        off_by_one,
        wrong_scale,
        position_scaling,
        sees_the_future,
        cached_decoding,
        padding_or_packing,
        settings_differ,
        computes_otherwise,
        does_not_run,
        tables_not_loaded,
        tables_shared,
        weights_differ,
        wrong_order,
        other_buckets,
        untrained_buckets,
        foreign_tables,
        not_fitted,
        far_order_lost,
        local_order_lost,
        domain_drift,
        short_context_forgotten,
        outside_trained_length,
        retrieval_lost,
        heads_lost,
        attention_spreads,
        other_temperature,
    )
]


def hypotheses_named(names: Sequence[str]) -> list[Hypothesis]:
    """The hypotheses of these names, all where there are none. ConfigError for another name."""
    by_name = {hypothesis.name: hypothesis for hypothesis in HYPOTHESES}
    for name in names:
        if name not in by_name:
            raise ConfigError(f"--only {name}: no such hypothesis; choose from {', '.join(by_name)}")
    return [by_name[name] for name in names or by_name]
