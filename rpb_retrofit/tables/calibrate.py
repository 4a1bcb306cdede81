"""Calibration: tables fitted to what the source attends to and hands on, on text, layer after layer.

Both models read the same windows of text. The source goes first, whole. Then each layer of the retrofit is fitted on
the content scores that it computes on top of the layers already fitted below it, so that it makes good for what they
lost; and its output, with its new table, is what the next layer reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.files.spool import Spool
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import FACTOR, TABLE
from rpb_retrofit.tables.attention_rows import AttentionRows
from rpb_retrofit.tables.bucket_search import Choice, Trial
from rpb_retrofit.tables.fit import Fit, fit
from rpb_retrofit.tables.head_matching import match_heads
from rpb_retrofit.tables.output_metric import metrics
from rpb_retrofit.tables.outputs import fit_outputs
from rpb_retrofit.tables.parameters import ParameterLayout
from rpb_retrofit.tables.recording import StopForward, record_source, resumed, run, watch
from rpb_retrofit.tables.table_spec import Start

QUERIES = 128
"""Queries of the longest window that are compared, evenly spaced: neighbours say much the same. Shorter windows have
the same spacing."""

HELD = 2**27
"""Bytes of a layer's rows that are held in memory while it is fitted."""

SHORTEST = 32
"""Tokens of the shortest window that says anything."""

POOR = 1.0
"""Mean KL in nats beyond which a head's attention counts as far from the source's."""


@dataclass(frozen=True)
class LayerFit:
    """How one attention was fitted. Per head: the mean KL from the source's attention in nats, of zero tables and of
    the fitted ones. Per bucket: the pairs of tokens that fell into it. ``heads``: where nothing was fitted, the head of
    the other checkpoint whose table each head took. ``missed``: per head, the share of the variance of the source's
    outputs that the fitted tables miss, and ``missed_by_attention`` what they missed when only the attention was
    fitted, roughly; None where the model hands out no values."""

    name: str
    before: list[float]
    after: list[float]
    visits: list[int]
    steps: int
    heads: list[int] | None = None
    missed: list[float] | None = None
    missed_by_attention: list[float] | None = None

    @property
    def unvisited(self) -> list[int]:
        """Buckets that no pair of tokens fell into: they continue their neighbours."""
        return [bucket for bucket, visits in enumerate(self.visits) if not visits]


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration saw and reached."""

    windows: int
    length: int
    queries: int
    layers: list[LayerFit]

    @property
    def before(self) -> float:
        """Mean KL over heads, with zero tables."""
        return _mean([kl for layer in self.layers for kl in layer.before])

    @property
    def after(self) -> float:
        """Mean KL over heads, with the fitted tables."""
        return _mean([kl for layer in self.layers for kl in layer.after])

    @property
    def poor(self) -> list[tuple[str, int, float]]:
        """(layer, head, KL) of the heads whose attention stays far from the source's, the worst first."""
        heads = [(layer.name, head, kl) for layer in self.layers for head, kl in enumerate(layer.after) if kl > POOR]
        return sorted(heads, key=lambda head: -head[2])

    def __str__(self) -> str:
        poor, heads = self.poor, sum(len(layer.after) for layer in self.layers)
        done = "calibrated" if self.layers[0].heads is None else "heads matched"
        lines = [
            f"{done} on {self.windows} windows of up to {self.length} tokens, {self.queries} queries a head: attention "
            f"KL from the source {self.before:.3f} -> {self.after:.3f} nats, mean of {heads} heads"
        ]
        if missed := [share for layer in self.layers for share in layer.missed or []]:
            first = [share for layer in self.layers for share in layer.missed_by_attention or []]
            lines.append(
                f"of the variance of the heads' outputs {_mean(first):.1%} is missed where roughly the attention alone "
                f"is fitted, {_mean(missed):.1%} by these tables"
            )
        if unvisited := sorted({bucket for layer in self.layers for bucket in layer.unvisited}):
            lines.append(
                f"buckets that no pair of tokens fell into (they continue their neighbours): "
                f"{', '.join(map(str, unvisited))}"
            )
        if poor:
            worst = ", ".join(f"{name} head {head} ({kl:.1f})" for name, head, kl in poor[:3])
            lines.append(
                f"the attention of {len(poor)} heads stays over {POOR:g} nat from the source's; the worst: {worst}"
            )
        return "\n".join(lines)


class Calibration:
    """A calibration in two acts: `record` on the plain model, `apply` on the same model with tables attached.

    Of the rotary frequencies the highest go on rotating, so many as ``kept`` says by the name of an attention (none of
    those it does not name), and get no factor.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        windows: Sequence[Tensor],
        seed: int,
        spool: Spool,
        kept: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.anatomy, self.windows, self.spool, self.kept = anatomy, windows, spool, kept
        generator = torch.Generator().manual_seed(seed)
        every = max(1, max(map(len, windows)) // QUERIES)
        self.positions = [_positions(len(window), every, generator) for window in self.windows]
        self.order: list[str] = []
        self.metrics: dict[str, Tensor] = {}

    def record(self) -> None:
        """Run the source on all windows, once."""
        with tqdm(total=len(self.windows), desc="source", unit="window", leave=False) as bar:
            self.order = record_source(self.anatomy, self.windows, self.positions, self.spool, bar.update)
        self.metrics = metrics(self.anatomy, self.windows[0])

    def choose(self) -> Choice:
        """How many buckets, and how far they reach, by a first calibration of an attached model's tables alone.

        DataError where there is no window to hold out.
        """
        if len(self.windows) < 2:
            raise DataError("calibration: one window of text; choosing buckets holds one out, so give two or more")
        attentions = self.anatomy.attentions
        directions = {getattr(module, TABLE).bucketing.bidirectional for module in attentions.values()}
        trial = Trial(self.order, max(map(len, self.windows)), sorted(directions))
        for name, pairs in self._layers("choosing buckets"):
            layout = replace(self._layout(name), pairs=None)
            trial(name, partial(_RowPairs, self.spool, name), len(self.windows), layout)
            _fill(attentions[name], layout, fit(pairs, layout).numbers)
        return trial.choice()

    def fill_roughly(self) -> None:
        """Fill tables and factors of an attached model so that its attention is near the source's: a first fit, to
        choose by."""
        for name, pairs in self._layers("choosing layers"):
            layout = self._layout(name)
            _fill(self.anatomy.attentions[name], layout, fit(pairs, layout).numbers)

    def apply(self, candidates: Mapping[str, Start] | None = None) -> CalibrationReport:
        """Fill the tables of an attached model. Tables that layers share get the mean of the layers' fits.

        With ``candidates``, by the tables' names, nothing is fitted: each head gets the best of their heads.
        """
        model, attentions = self.anatomy.model, self.anatomy.attentions
        starts = {id(model.get_submodule(name.removesuffix(".weight"))): c for name, c in (candidates or {}).items()}
        layers, shared = [], defaultdict[int, list[Tensor]](list)
        for name, pairs in self._layers("calibrating"):
            layout, bias, heads = self._layout(name), getattr(attentions[name], TABLE), None
            if candidates is None:
                fitted = fit_outputs(pairs, layout, self.metrics.get(name))
            else:
                fitted, heads = match_heads(pairs, layout, starts[id(bias)])
            layers.append(_describe(name, fitted, layout, heads))
            shared[id(bias)].append(fitted.numbers[:, : layout.num_bias])
            bias_numbers = torch.stack(shared[id(bias)]).mean(0)
            _fill(attentions[name], layout, torch.cat([bias_numbers, fitted.numbers[:, layout.num_bias :]], 1))
        queries = sum(len(positions) for positions in self.positions)
        return CalibrationReport(len(self.windows), max(map(len, self.windows)), queries, layers)

    def _layers(self, doing: str) -> Iterator[tuple[str, _RowPairs]]:
        """Each attention in running order with its rows, on top of what was filled in until then."""
        model, windows = self.anatomy.model, range(len(self.windows))
        blocks = [self.anatomy.block_of(name) for name in self.order]
        with watch(self.anatomy) as listen:
            for index, name in enumerate(tqdm(self.order, desc=doing, unit="layer", leave=False)):
                for number in windows:
                    listen(self._keep(name, number), self.positions[number])
                    with resumed(model, blocks, index, self.spool, number):
                        run(model, self.windows[number])
                yield name, _RowPairs(self.spool, name, windows)
                for number in windows:
                    del self.spool["student", name, number]

    def _layout(self, name: str) -> ParameterLayout:
        attention = self.anatomy.attentions[name]
        bias, factor = getattr(attention, TABLE), attention._modules.get(FACTOR)
        return ParameterLayout(
            bias.bucketing,
            bias.tail is not None,
            None if factor is None else factor.pairs,
            self.kept.get(name, 0),
        )

    def _keep(self, wanted: str, number: int) -> Callable[[str, AttentionRows], None]:
        """Take the rows of one attention, and end the forward pass there."""

        def take(name: str, rows: AttentionRows) -> None:
            if name == wanted:
                self.spool["student", name, number] = rows
                raise StopForward

        return take


@torch.no_grad()
def _fill(attention: Any, layout: ParameterLayout, numbers: Tensor) -> None:
    bias = getattr(attention, TABLE)
    bias.weight.copy_(layout.table(numbers))
    if layout.tail:
        bias.tail.copy_(layout.slopes(numbers))
    if layout.num_factors:
        getattr(attention, FACTOR).weight.copy_(layout.factor(numbers))


@dataclass(frozen=True)
class _RowPairs:
    """The rows of the source and of the student, window by window, from disk; once, where they are few."""

    spool: Spool
    name: str
    windows: Sequence[int]

    def __iter__(self) -> Any:
        yield from self._read() if self._held is None else self._held

    @cached_property
    def _held(self) -> list[tuple[AttentionRows, AttentionRows]] | None:
        keys = [(side, self.name, number) for side in ("source", "student") for number in self.windows]
        return list(self._read()) if sum(map(self.spool.bytes, keys)) <= HELD else None

    def _read(self) -> Iterator[tuple[AttentionRows, AttentionRows]]:
        for number in self.windows:
            yield self.spool["source", self.name, number], self.spool["student", self.name, number]


def check_windows(model: PreTrainedModel, calibration: Any) -> list[Tensor]:
    """Token ids as windows (n,): from tensors (n,) or (batch, n), or mappings with ``input_ids``.

    DataError where they are padded, too short to say anything, or not the model's.
    """
    windows: list[Tensor] = []
    for batch in calibration:
        if hasattr(batch, "keys"):
            mask = batch.get("attention_mask")
            batch = batch["input_ids"]
            if mask is not None and not bool(torch.as_tensor(mask).bool().all()):
                raise DataError("calibration: a batch is padded; give windows of text without padding")
        ids = torch.as_tensor(batch)
        if ids.is_floating_point() or ids.dim() not in (1, 2):
            raise DataError(
                f"calibration: {ids.dtype} of shape {tuple(ids.shape)}; it takes token ids (n,) or (batch, n)"
            )
        windows += list(ids.reshape(-1, ids.shape[-1]).long())
    if not windows or min(map(len, windows)) < SHORTEST:
        shortest = f"a window of {min(map(len, windows))} tokens" if windows else "no text"
        raise DataError(f"calibration: {shortest}; give windows of at least {SHORTEST} tokens")
    known: int = cast(Any, model.get_input_embeddings()).num_embeddings
    if (highest := max(int(window.max()) for window in windows)) >= known:
        raise DataError(f"calibration: token id {highest}; the model knows {known}: use its own tokenizer")
    return windows


def _positions(length: int, every: int, generator: torch.Generator) -> range:
    """Descending positions of the queries that are compared, ``every`` apart, from a random one of the last on."""
    last = length - 1 - int(torch.randint(min(every, length), (), generator=generator))
    return range(last, -1, -every)


def _describe(name: str, fitted: Fit, layout: ParameterLayout, heads: list[int] | None) -> LayerFit:
    if not all(bool(values.isfinite().all()) for values in (fitted.numbers, fitted.before, fitted.after)):
        raise ConfigError(
            f"{name}: its attention could not be fitted, its scores on the calibration text are not finite: does the "
            "source give numbers on it, in a dtype that holds them?"
        )
    before, after, visits = (x.tolist() for x in (fitted.before, fitted.after, fitted.visits))
    by_attention, missed = (None, None) if fitted.missed is None else (x.tolist() for x in fitted.missed)
    return LayerFit(name, before, after, visits, fitted.steps, heads, missed, by_attention)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
