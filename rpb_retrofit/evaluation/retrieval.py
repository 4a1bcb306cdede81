"""Finding things in a long context: items with one right answer each, and how a model does on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.evaluation.context_use import Induction, LocalOrder, induction_gain, local_order_gain
from rpb_retrofit.evaluation.filler import pieces
from rpb_retrofit.evaluation.nll import check_length, logits_at
from rpb_retrofit.evaluation.prompt import fill, write
from rpb_retrofit.evaluation.tasks import KINDS, PLACED, SPREAD


@dataclass(frozen=True, eq=False)
class Item:
    """A prompt of ``length`` tokens ``ids`` (length,), of which those from ``answer`` on are the right answer.

    ``depth`` is where in the context the answer stands, 0 at its beginning and 1 at its end; None where it has to be
    gathered from all over it. ``number`` tells the items of a cell (kind, length, depth) apart: two models that are
    given the same items can be compared pair by pair.
    """

    kind: str
    length: int
    depth: float | None
    number: int
    ids: Tensor
    answer: int


@dataclass(frozen=True)
class Score:
    """Whether a model's greedy continuation is the answer, and the answer's mean loss in nats a token."""

    correct: bool
    nll: float


@dataclass(frozen=True)
class Cell:
    """Share of ``items`` of one kind, length and depth that were ``correct``, and the mean of their ``nll``."""

    kind: str
    length: int
    depth: float | None
    items: int
    correct: float
    nll: float


def make_items(
    kind: str,
    tokenizer: Any,
    filler: Sequence[Tensor],
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int = 0,
) -> list[Item]:
    """``count`` items for each length and depth, or for each length where the kind is spread over the context.

    Args:
        kind: one of `KINDS`.
        tokenizer: the model's; with a chat template the prompt is a user's message and the beginning of the reply.
        filler: documents (n,) of token ids, which the context of most kinds is cut from, each time in another place.
        lengths: tokens of an item, answer included.
        depths: 0 to 1.
        count: an item is the same whatever this is, and whichever other kinds, lengths and depths are asked for.
        seed: other items of the same sort.

    Raises:
        ConfigError for an unknown kind or a depth outside 0 to 1; DataError where a length has no room for the
        question, the filler is too short, or the tokenizer cannot spell the answer.
    """
    check_kind(kind)
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ConfigError(f"depth {wrong[0]}: it must lie between 0, the context's beginning, and 1, its end")
    places = [float(depth) for depth in depths] if kind in PLACED else [None]
    return [
        item
        for length in lengths
        for depth in places
        for item in _cell(kind, tokenizer, filler, length, depth, count, seed)
    ]


def check_kind(kind: str) -> None:
    """ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"retrieval '{kind}': no such kind, choose from {', '.join(KINDS)}")


def _cell(
    kind: str, tokenizer: Any, filler: Sequence[Tensor], length: int, depth: float | None, count: int, seed: int
) -> list[Item]:
    name = f"{seed} {kind} {length} {depth}"
    items, texts = [], list[Tensor]()
    for number in range(count):
        random = Random(f"{name} {number}")
        task = SPREAD[kind](random, length) if depth is None else PLACED[kind](random, depth)
        prompt = write(tokenizer, task)
        if (room := length - prompt.size) < len(prompt.needles):
            least = prompt.size + len(prompt.needles)
            raise DataError(f"length {length}: a question of kind {kind} takes {least} tokens: give a longer one")
        if task.padding is None:
            # Pieces of the whole length, so that those of all items of the cell lie in different places.
            texts = texts or pieces(filler, length, count, Random(name))
            padding = [[token] for token in texts[number][:room].tolist()]
        else:
            padding = fill(tokenizer, task.padding, room)
        ids = prompt.around(padding)
        items.append(Item(kind, length, depth, number, torch.tensor([*ids, *prompt.answer]), len(ids)))
    return items


@torch.no_grad()
def score(model: PreTrainedModel, item: Item) -> Score:
    """One forward pass with the right answer in place.

    Where every token of it is the most likely one after those before it, greedy decoding would have written it.
    """
    ids = item.ids.to(next(model.parameters()).device)
    logits = logits_at(model, ids, torch.arange(item.answer - 1, len(ids) - 1, device=ids.device))
    target = ids[item.answer :]
    correct = bool((logits.argmax(-1) == target).all())
    return Score(correct, torch.nn.functional.cross_entropy(logits, target).item())


def measure(
    model: PreTrainedModel, probes: Sequence[Item | Induction | LocalOrder], progress: bool = True
) -> list[dict[str, Any]]:
    """What a model makes of each, in their order, as JSON can hold it: kind, size, number and figures.

    Raises DataError, before anything is measured, where the model cannot take a length.
    """
    for length in sorted({len(probe.ids) for probe in probes}):
        check_length(model, length)
    rows = []
    shown: dict[str, Any] = {} if progress else {"disable": True}  # else the user's TQDM_DISABLE counts
    with tqdm(total=sum(len(probe.ids) for probe in probes), unit="tok", desc="retrieval", leave=False, **shown) as bar:
        for probe in probes:
            rows.append(_row(model, probe))
            bar.update(len(probe.ids))
    return rows


def _row(model: PreTrainedModel, probe: Item | Induction | LocalOrder) -> dict[str, Any]:
    match probe:
        case Item():
            named = {"kind": probe.kind, "length": probe.length, "depth": probe.depth, "number": probe.number}
            return {**named, **asdict(score(model, probe))}
        case Induction():
            gain = induction_gain(model, probe)
            return {"kind": "induction", "distance": probe.distance, "number": probe.number, **asdict(gain)}
        case LocalOrder():
            gain = local_order_gain(model, probe)
            return {"kind": "local-order", "length": len(probe.ids), "number": probe.number, **asdict(gain)}


def cells(rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """The rows that `measure` made of items, a cell for each kind, length and depth, in the order they come in."""
    grouped: dict[tuple[str, int, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] in KINDS:
            grouped.setdefault((row["kind"], row["length"], row["depth"]), []).append(row)
    return [
        Cell(*key, len(group), fmean(row["correct"] for row in group), fmean(row["nll"] for row in group))
        for key, group in grouped.items()
    ]
