"""Every measurement that a hypothesis may ask for, each taken once: of the models that run, and beside the source.

Losses, tasks and what undoing brings have files of their own; `Measurements` holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE, Arms
from rpb_retrofit.diagnosis.attention_patterns import AttentionPatterns, attention_patterns
from rpb_retrofit.diagnosis.bias_check import BiasCheck, compare
from rpb_retrofit.diagnosis.consistency import Way, Ways, consistency
from rpb_retrofit.diagnosis.effect import Predictions, Scores
from rpb_retrofit.diagnosis.failures import Failures, Result
from rpb_retrofit.diagnosis.fidelity import Fidelity, fidelity
from rpb_retrofit.diagnosis.full_precision import computes_in, in_float32
from rpb_retrofit.diagnosis.loss_measurements import LossMeasurements
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.position_probe import AttentionProbe, PositionProbe, position_probe
from rpb_retrofit.diagnosis.provenance import UNKNOWN, alterations
from rpb_retrofit.diagnosis.rebuilt import Rebuilt, rebuilt
from rpb_retrofit.diagnosis.task_measurements import TaskMeasurements
from rpb_retrofit.diagnosis.text_windows import TextWindows
from rpb_retrofit.diagnosis.undoing import Undoing
from rpb_retrofit.diagnosis.weights import drift, trained
from rpb_retrofit.evaluation.losses import Losses
from rpb_retrofit.evaluation.speed import Seconds, Skipped, SpeedResult, speed
from rpb_retrofit.files.journal import Journal
from rpb_retrofit.runtime.anatomy import Anatomy

MEASURED = (
    *(PositionProbe, AttentionProbe, Rebuilt, Way, Ways, Fidelity, AttentionPatterns),
    *(Losses, Scores, Predictions, SpeedResult, Seconds, Skipped),
)
"""The data classes of measurements, which a journal may hold."""


@dataclass
class Measurements:
    """The measurements of ``arms`` on ``documents`` of token ids, each (n,) int64.

    ``bos``: the token that begins every window. ``tokenizer``: for questions in words; without one only what token ids
    can show is measured. ``pairs``: of queries and keys that trained each bucket, where a training.json says so.
    ``skipped``: what was not measured, and why; ``failed``: what ended in an error, and in which.
    """

    arms: Arms
    documents: Sequence[Tensor]
    bos: int | None = None
    plan: DiagnosisPlan = field(default_factory=DiagnosisPlan)
    tokenizer: Any = None
    pairs: Sequence[int] | None = None
    journal: Journal = field(default_factory=Journal)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: Failures = field(default_factory=Failures)

    def __post_init__(self) -> None:
        self.text = TextWindows(self.arms, self.documents, self.bos, self.plan, self.skipped)
        self.losses = LossMeasurements(self.arms, self.text, self.journal)
        self.tasks = TaskMeasurements(self.arms, self.text, self.journal, self.tokenizer)
        self.undoing = Undoing(self.arms, self.text, self.journal, self.failed)

    def attempt(self, what: str, measure: Callable[[], Result], otherwise: Result) -> Result:
        """What ``measure`` gives; ``otherwise`` where it ends in an error, which is noted and costs nothing else."""
        return self.failed.attempt(what, measure, otherwise)

    # --- positions, bias and attention --------------------------------------------------------------------------------

    @cached_property
    def position_probe(self) -> PositionProbe:
        """What positions do in the retrofit."""
        return self._position_probe(RETROFIT, self.arms.retrofit)

    @cached_property
    def source_position_probe(self) -> PositionProbe:
        """What they do in its source; without one, in the source's class with the retrofit's weights."""
        if not self.arms.family.uses_interface:
            return PositionProbe({}, 0.0)
        return self._position_probe(SOURCE, self.arms.reference)

    def _position_probe(self, role: str, model: PreTrainedModel) -> PositionProbe:
        reach = max((bias.bucketing.max_distance for bias in self.arms.biases.values()), default=0)
        far = min(2 * reach, 4096) if role == RETROFIT else 0

        def measure() -> PositionProbe:
            with in_float32(model):
                return position_probe(Anatomy.of(model), self.text.within(256), far)

        return self.journal(f"positions-{role}", measure)

    @property
    def running(self) -> bool:
        """Whether every attention of the retrofit has a table and runs the retrofit's attention."""
        return len(self.arms.biases) == len(self.arms.attentions) == len(self.position_probe.probes)

    @cached_property
    def bias_checks(self) -> dict[str, BiasCheck]:
        """Whether the bias that acts in each attention is its table's."""
        biases = self.arms.biases
        return {
            name: compare(name, probe, biases, self.arms.width, self.precision)
            for name, probe in self.position_probe.probes.items()
            if name in biases
        }

    def attention_patterns(self, role: str) -> AttentionPatterns | None:
        """Where the heads of an arm look; None without that arm, or where its attention does not run."""
        model = self.arms.model(role)
        if model is None or not self.running:
            return None
        text = self.text.window(self.text.within(512))
        return self.journal(
            f"attention_patterns-{role}",
            lambda: attention_patterns(Anatomy.of(model), text, self.text.common, min(48, len(text) // 2)),
        )

    # --- what the model computes ----------------------------------------------------------------------------------

    @cached_property
    def precision(self) -> torch.dtype:
        """In which the retrofit computes where its equal ways are compared."""
        return computes_in(self.arms.retrofit)

    @cached_property
    def rebuilt(self) -> Rebuilt:
        """The retrofit beside one built anew from its config and weights; in float32 where memory allows."""
        model, window = self.arms.retrofit, self.text.window(self.text.within(1024))
        rounded = next((b.dtype for b in model.buffers() if b.is_floating_point() and b.element_size() == 2), None)

        def measure() -> Rebuilt:  # buffers that a cast rounded are none that a new model has
            with in_float32(model) as dtype:
                return rebuilt(model, window, rounded or dtype)

        return self.journal("rebuilt", measure)

    @cached_property
    def ways(self) -> Ways:
        """How the retrofit's logits depend on the way it is fed; in float32 where memory allows."""
        return self._ways(RETROFIT, self.arms.retrofit)

    @cached_property
    def source_ways(self) -> Ways:
        """The same of its source; without one, of the source's class with the retrofit's weights."""
        return self._ways(SOURCE, self.arms.reference)

    def _ways(self, role: str, model: PreTrainedModel) -> Ways:
        short, long = (self.text.window(self.text.within(length)) for length in (96, 1024))

        def measure() -> Ways:
            with in_float32(model) as dtype:
                return consistency(model, short, long, dtype)

        return self.journal(f"ways-{role}", measure)

    @cached_property
    def half_precision_ways(self) -> Ways | None:
        """The retrofit's in float16, where `ways` took float32: what overflows does so here alone. None of any other
        dtype: bfloat16 reaches as far as float32."""
        model, ids = self.arms.retrofit, self.text.window(self.text.within(96))
        if model.dtype != torch.float16 or self.precision == model.dtype:
            return None
        return self.journal("ways-half-precision", lambda: consistency(model, ids, ids, model.dtype))

    @cached_property
    def speed(self) -> dict[str, list[SpeedResult | Skipped]]:
        """How fast source and retrofit are at the middle length, side by side; empty where that is not wanted."""
        if not self.plan.rounds:
            return {}
        models = {role: model for role, model in self.arms if role in (SOURCE, RETROFIT)}
        return self.journal("speed", lambda: speed(models, [self.text.middle], new_tokens=16, rounds=self.plan.rounds))

    # --- weights and tables beside the source ---------------------------------------------------------------------

    @cached_property
    def moved(self) -> dict[str, float | None]:
        """By how much of its size each of the source's weights moved; empty without a source."""
        return {} if self.arms.source is None else drift(self.arms.retrofit, self.arms.source)

    @cached_property
    def weights_trained(self) -> bool:
        """Whether weights moved as training moves them, other than those into which a retrofit folds something."""
        within = tuple(f"{attention}." for attention in self.arms.attentions) if self.arms.folded else ()
        return any(not (within and name.startswith(within)) for name in trained(self.moved))

    @cached_property
    def trained_since(self) -> bool:
        """Whether the retrofit's weights or tables were trained after the retrofit, as far as the other arms tell."""
        if self.arms.untrained is not None:
            before = dict(self.arms.untrained.named_parameters())
            own = self.arms.retrofit.named_parameters()
            return any(not torch.equal(p, before[n].to(p.dtype)) for n, p in own if n in before)
        return self.weights_trained

    @cached_property
    def alterations(self) -> dict[str, str] | None:
        """What became of the tables since they were written. None where that is not known: without checksums, or where
        a training that wrote none changed some in no simple way."""
        changed = alterations(self.arms, self.arms.width)
        strange = [name for name, became in (changed or {}).items() if became == UNKNOWN]
        return None if strange and (len(strange) > len(self.arms.biases) / 2 or self.weights_trained) else changed

    @property
    def as_written(self) -> bool:
        """Whether every table is, number for number, what a retrofit or a training wrote."""
        return self.alterations == {}

    @cached_property
    def fidelity(self) -> Fidelity | None:
        """Whether the tables suit the source; None without one, or where the tables cannot be read."""
        source, arms = self.arms.source_anatomy, self.arms
        if source is None or arms.family.mechanism == "t5" or not self.running:
            return None
        windows, changed = self.text.held_out, self.alterations
        suspected = list(arms.attentions) if changed is None else [n for n, what in changed.items() if what == UNKNOWN]
        return self.journal("fidelity", lambda: fidelity(arms, source, windows, arms.width, suspected))
