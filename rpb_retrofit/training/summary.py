"""What a run did, as figures and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from rpb_retrofit.evaluation.plots import training_curves
from rpb_retrofit.files.checked import Written, checked
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.pages.words import number
from rpb_retrofit.runtime.buckets import bucket_of
from rpb_retrofit.training.batches import bucketing_of, pairs_by_bucket
from rpb_retrofit.training.recipe import Stage
from rpb_retrofit.training.step import Progress
from rpb_retrofit.version import __version__

SUMMARY, PICTURE = "training.json", "training.png"


@dataclass(frozen=True)
class StageSummary:
    """One stage: ``losses`` by step, ``pairs_by_bucket`` of one head (none for a control), ``untrained_buckets`` that
    some offset reaches and no pair of tokens did, ``evaluations`` by step."""

    train: str
    steps: int
    scored_tokens: int
    seconds: float
    losses: list[float]
    skipped: list[str]
    pairs_by_bucket: list[int]
    untrained_buckets: list[int]
    evaluations: list[dict[str, Any]]


@dataclass(frozen=True)
class Summary:
    """A run: what it depended on (model, source, recipe), where it ran, and its stages."""

    identity: dict[str, Any]
    processes: int
    device: str
    mode: str
    stages: list[StageSummary]
    version: str = __version__

    def __str__(self) -> str:
        tokens, seconds = (sum(getattr(s, name) for s in self.stages) for name in ("scored_tokens", "seconds"))
        kind = "control (the source, by the same recipe)" if self.identity["control"] else "retrofit"
        lines = [
            f"{kind}: {tokens:,} tokens scored in {seconds:.0f} s on {self.processes} x {self.device} ({self.mode})"
        ]
        first, last = self.stages[0].evaluations, self.stages[-1].evaluations
        for before, after in zip(first[:1], last[-1:], strict=True):
            pairs = zip(before["by_length"], after["by_length"], strict=True)
            lines += [
                f"held-out loss at {a['length']}: {number(b['nll'])} -> {number(a['nll'])} nats a token"
                for b, a in pairs
            ]
            if not after["by_length"]:
                lines.append(f"held-out objective: {number(before['loss'], '.4f')} -> {number(after['loss'], '.4f')}")
        skipped = [reason for stage in self.stages for reason in stage.skipped]
        lines += [f"{len(skipped)} steps skipped; the first: {skipped[0]}"] if skipped else []
        if untrained := set.intersection(*(set(stage.untrained_buckets) for stage in self.stages)):
            named = ", ".join(map(str, sorted(untrained)))
            lines.append(f"buckets that no pair trained: {named}; longer sequences would reach them")
        return "\n".join(lines)


def read_summary(folder: Path) -> Summary:
    """The summary that `write_summary` wrote. CheckpointError where the file holds something else."""
    content = checked(folder / SUMMARY, _Summary, "rpb finetune")
    known = {field.name for field in fields(Summary)}
    stages = [StageSummary(**{f.name: stage[f.name] for f in fields(StageSummary)}) for stage in content["stages"]]
    return Summary(**{**{name: content[name] for name in known if name in content}, "stages": stages})


class _Length(Written):
    length: int
    nll: float | None  # null: it was not finite


class _Evaluation(Written):
    loss: float | None
    by_length: list[_Length]


class _Stage(Written):
    train: str
    steps: int
    scored_tokens: int
    seconds: float
    losses: list[float | None]
    skipped: list[str]
    pairs_by_bucket: list[int]
    untrained_buckets: list[int]
    evaluations: list[_Evaluation]


class _Data(Written):
    name: str


class _Recipe(Written):
    objective: str
    data: list[_Data]


class _Identity(Written):
    model: str
    source: str
    control: bool
    recipe: _Recipe


class _Summary(Written):
    identity: _Identity
    processes: int
    device: str
    mode: str
    stages: Annotated[list[_Stage], Field(min_length=1)]
    version: str


def stage_summary(stage: Stage, progress: Progress, model: PreTrainedModel) -> StageSummary:
    """What a stage did. Pairs are those of full attention: layers with a sliding window see fewer."""
    pairs, untrained = [], []
    if (bucketing := bucketing_of(model)) is not None:
        pairs = pairs_by_bucket(progress.parts, bucketing)
        reach = bucketing.max_distance + 1  # bidirectional tables have a bucket that no offset reaches
        reached = bucket_of(torch.arange(-reach, reach + 1), bucketing).unique().tolist()
        untrained = [bucket for bucket in reached if not pairs[bucket]]
    return StageSummary(
        stage.train, progress.step, progress.scored, progress.seconds, progress.losses, progress.skipped, pairs,
        untrained, progress.evaluations,
    )  # fmt: skip


def write_summary(summary: Summary, folder: Path) -> None:
    """Figures and picture, into a folder."""
    (folder / SUMMARY).write_text(json_text(asdict(summary)))
    training_curves(asdict(summary)["stages"], folder / PICTURE)
