"""The pictures of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from transformers import PreTrainedModel

from rpb_retrofit.evaluation.nll import LengthResult
from rpb_retrofit.files.printable import one_line
from rpb_retrofit.files.whole_file import write_whole
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.buckets import Bucketing, bucket_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "figure.dpi": 130,
    "legend.frameon": False,
}
"""How every picture of the package looks; for ``plt.rc_context``."""


def save(figure: Any, file: Path) -> None:
    """Write a figure, whole or not at all, and forget it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix.removeprefix("."))
    plt.close(figure)
    write_whole(file, drawn.getvalue())


def legible(name: str) -> str:
    """A name from outside as a picture shows it: a dollar would begin a formula, and a wrong one ends the drawing."""
    return one_line(name).replace("$", r"\$")


def log2_positions(axes: Any) -> None:
    """A log axis of positions, with plain numbers at powers of two."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))


def loss_by_position(results: Mapping[str, Sequence[LengthResult]]) -> Any:
    """A figure: loss against position in the window, one line per model and length, positions on a log scale."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        for number, (name, lengths) in enumerate(results.items()):
            for shade, result in enumerate(lengths):
                centre = [(b.first * b.last) ** 0.5 for b in result.by_position]
                fade = 0.35 + 0.65 * (shade + 1) / len(lengths)
                label = f"{legible(name)}, windows of {result.length}"
                axes.plot(
                    centre, [b.nll for b in result.by_position], "o-", ms=3, color=f"C{number}", alpha=fade, label=label
                )
        log2_positions(axes)
        axes.set_xlabel("position in the window (tokens of context)")
        axes.set_ylabel("loss (nats a token)")
        axes.legend(fontsize=8)
        figure.tight_layout()
    return figure


@torch.no_grad()
def bias_by_offset(model: PreTrainedModel) -> Any:
    """A figure: the bias of every layer against the offset, averaged over heads, with the heads' range of one layer."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, RelativePositionBias)}
    bucketing: Bucketing = next(iter(modules.values())).bucketing
    reach = 2 * bucketing.max_distance
    first = -reach if bucketing.bidirectional else 0
    offset = torch.arange(first, reach + 1)
    curves = torch.stack([m(offset.to(m.weight.device)).cpu().mean(0) for m in modules.values()])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        colours = plt.colormaps["viridis"](torch.linspace(0, 0.9, len(curves)).numpy())
        for curve, colour in zip(curves, colours, strict=True):
            axes.plot(offset, curve, color=colour, lw=1, drawstyle="steps-post")
        axes.set_xscale("symlog", linthresh=bucketing.num_exact, base=2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%d"))
        axes.axvline(bucketing.max_distance, color="grey", ls=":", lw=1)
        axes.text(
            bucketing.max_distance, 0.98, " last bucket", transform=axes.get_xaxis_transform(), va="top", fontsize=8
        )
        if not curves.any():
            axes.set_ylim(-1, 1)
            axes.text(0.5, 0.55, "all tables are zero", transform=axes.transAxes, ha="center")
        axes.set_xlabel("offset (query position minus key position)")
        axes.set_ylabel("bias, mean over heads")
        axes.set_title(f"{len(curves)} tables, first layer dark, last light", fontsize=10)
        figure.tight_layout()
    return figure


def bucket_map(bucketing: Bucketing) -> Any:
    """A figure: bucket against offset, to twice the maximum distance, with its three parts named."""
    reach = 2 * bucketing.max_distance
    offset = torch.arange(-reach if bucketing.bidirectional else 0, reach + 1)
    bucket = bucket_of(offset, bucketing)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4))
        axes.plot(offset, bucket, drawstyle="steps-post", lw=1.5)
        axes.axvspan(
            -bucketing.num_exact + 1 if bucketing.bidirectional else 0, bucketing.num_exact, color="C1", alpha=0.15
        )
        for sign in (1, -1) if bucketing.bidirectional else (1,):
            axes.axvline(sign * bucketing.max_distance, color="grey", ls=":", lw=1)
        axes.set_xlabel("offset (query position minus key position)")
        axes.set_ylabel("bucket")
        axes.set_title("shaded: one to one; dotted: maximum distance, constant beyond", fontsize=10)
        figure.tight_layout()
    return figure


SMOOTHED = 20
"""Steps that a line of training losses is the mean of."""


def training_curves(stages: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a figure of a run: loss by step, held-out loss by position before and after, pairs that trained buckets.

    ``stages`` are those of training.json.
    """
    with plt.rc_context(STYLE):
        figure, (steps, positions, buckets) = plt.subplots(1, 3, figsize=(15, 4))
        start = 0
        for number, stage in enumerate(stages):
            losses = stage["losses"]
            at = range(start + 1, start + len(losses) + 1)
            steps.plot(at, losses, ".", ms=3, alpha=0.5, color=f"C{number}")
            means = [fmean(losses[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(losses))]
            steps.plot(at, means, lw=1.5, color=f"C{number}", label=f"{stage['train']}, mean of {SMOOTHED} steps")
            start += len(losses)
        steps.set_xlabel("step")
        steps.set_ylabel("training loss (the objective's, a token)")
        steps.legend(title="trained", fontsize=8)
        evaluations = [evaluation for stage in stages for evaluation in stage["evaluations"]]
        for evaluation, name in zip(evaluations[:1] + evaluations[-1:], ("before", "after"), strict=False):
            for result in evaluation["by_length"][-1:]:
                centre = [(first * last) ** 0.5 for first, last, _, _ in result["by_position"]]
                losses = [nll for _, _, nll, _ in result["by_position"]]
                positions.plot(centre, losses, "o-", ms=3, label=f"{name}, windows of {result['length']}")
                log2_positions(positions)
        if positions.has_data():
            positions.set_xlabel("position in the window (tokens of context)")
            positions.set_ylabel("held-out loss (nats a token)")
            positions.legend(fontsize=8)
        else:  # a model without next tokens: its objective, by step
            start, points = 0, []
            for stage in stages:
                points += [(start + evaluation["step"], evaluation["loss"]) for evaluation in stage["evaluations"]]
                start += stage["steps"]
            positions.plot(*zip(*points, strict=True) if points else ([], []), "o-", ms=3)
            positions.set_xlabel("step")
            positions.set_ylabel("held-out loss (the objective's, a token)")
        counts = [sum(pairs) for pairs in zip(*(stage["pairs_by_bucket"] for stage in stages), strict=True)]
        buckets.bar(range(len(counts)), counts)
        if any(counts):
            buckets.set_yscale("log")
        buckets.set_xlabel("bucket")
        buckets.set_ylabel("(query, key) pairs that trained it, a head")
        figure.tight_layout()
        save(figure, file)
