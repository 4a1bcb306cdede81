"""The tables are in the wrong order: of heads within a layer, or of layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rpb_retrofit.diagnosis.fidelity import best_order
from rpb_retrofit.diagnosis.finding import CauseKind, Finding, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.intervention import with_tables
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.provenance import HEADS, LAYERS, is_written
from rpb_retrofit.diagnosis.shared_evidence import LEFT, NOTABLE, WON_BACK, altered, explains, of_kind, with_best

CAUSE = "the tables are in the wrong order of heads or layers"
PREDICTS = "the source's attention is nearer when heads exchange their rows, or layers their tables"
KIND = CauseKind.NUMBERS
REMEDY = (
    "put the tables back in their order, or calibrate again; after a change of head order, permute the tables as well"
)


def examine(measurements: Measurements) -> Finding:
    """Find the assignment of rows to heads, and of tables to layers, that is nearest to the source."""
    acting = of_kind(measurements, "with its heads in another order") + of_kind(measurements, "another layer's")
    if acting:
        return confirmed(
            f"the bias that acts is another head's or layer's than the table's in {name_layers(acting)}",
            REMEDY,
        )
    if known := [*altered(measurements, HEADS), *altered(measurements, LAYERS)]:
        return confirmed(
            f"by the checksums of what was written, {name_layers(known)} hold their rows in another order, or other "
            "layers'",
            REMEDY,
            effect=with_best(measurements, known),
            undoing="fitted anew: ",
        )
    if measurements.as_written:
        return excluded("every table is what a retrofit or a training wrote, number for number")
    if measurements.fidelity is None:
        return unknown("only the source's attention tells whose table it is; give --source")
    layers, heads = _layers(measurements) if measurements.alterations is None else None, _heads(measurements)
    brought = sum(gain for _, gain in heads.values())
    if layers is not None and layers.brought > brought:
        tables = {
            name: measurements.arms.biases[other].weight.detach().clone() for name, other in layers.others.items()
        }
        return _confirm(measurements, "layers-put-back", layers.evidence, tables)
    if heads:
        biases = measurements.arms.biases
        tables = {name: biases[name].weight.detach()[order].clone() for name, (order, _) in heads.items()}
        return _confirm(measurements, "heads-put-back", _said(heads), tables)
    return excluded("no exchange of rows or of tables brings the attention nearer to the source's")


def _confirm(measurements: Measurements, name: str, evidence: str, tables: Mapping[str, Tensor]) -> Finding:
    """Whether it is borne out by the running model with these tables."""
    biases = {name: measurements.arms.biases[name] for name in tables}
    effect = measurements.undoing.attempt(name, partial(with_tables, biases, lambda n, b: tables[n]))
    if effect is None or measurements.alterations is not None or explains(measurements, effect, list(tables)):
        return confirmed(evidence, REMEDY, effect=effect, undoing="")
    return excluded(f"{evidence}, but {effect}")


def _heads(measurements: Measurements) -> dict[str, tuple[list[int], float]]:
    """The attentions in which heads are to exchange rows: the row of each head, and the KL that it wins, summed."""
    fidelity, orders = measurements.fidelity, dict[str, tuple[list[int], float]]()
    assert fidelity is not None
    for name, cost in fidelity.swaps.items():
        order, best, now = best_order(cost)
        excess = (fidelity.own[name] - fidelity.refit[name]).sum().item()
        moved = _moved(order)
        left = 2 * LEFT * (fidelity.zeros[name] - fidelity.refit[name]).sum().item()
        near = best - fidelity.refit[name].sum().item() < left  # random rows, too, suit other heads by chance
        if name in (measurements.alterations or {}):
            if moved and is_written(measurements.arms, name, measurements.arms.biases[name].weight.detach()[order]):
                orders[name] = order, now - best
        elif moved and (now - best) / len(moved) > NOTABLE and now - best > WON_BACK * excess and near:
            orders[name] = order, now - best
    return orders


def _moved(order: list[int]) -> list[int]:
    return [head for head, other in enumerate(order) if head != other]


def _said(heads: Mapping[str, tuple[list[int], float]]) -> str:
    moved = {name: _moved(order) for name, (order, _) in heads.items()}
    brought = sum(gain for _, gain in heads.values()) / sum(map(len, moved.values()))
    which = ", ".join(f"{name_layers([n])}: heads {', '.join(map(str, heads))}" for n, heads in list(moved.items())[:4])
    more = f" and {len(moved) - 4} more layers" if len(moved) > 4 else ""
    return (
        f"the source's attention is nearer by {brought:.3f} nats of mean KL when heads exchange their rows "
        f"({which}{more})"
    )


class _Layers(NamedTuple):
    """Exchanged layers: the evidence, the KL that putting them back wins, summed over heads, and whose each is."""

    evidence: str
    brought: float
    others: dict[str, str]


def _layers(measurements: Measurements) -> _Layers | None:
    fidelity = measurements.fidelity
    assert fidelity is not None
    names = list(fidelity.layers)
    if len(names) < 2:
        return None
    cost = torch.full((len(names), len(names)), torch.inf)
    for row, name in enumerate(names):
        for other, kl in fidelity.layers[name].items():
            cost[row, names.index(other)] = kl
    order, best, now = best_order(cost)
    moved = [names[row] for row, other in enumerate(order) if row != other]
    excess = sum((fidelity.own[n] - fidelity.refit[n]).mean().item() for n in moved)
    if not moved or (now - best) / len(moved) < NOTABLE or now - best < WON_BACK * excess:
        return None
    heads = len(next(iter(fidelity.own.values())))
    return _Layers(
        f"the source's attention says that the tables of {name_layers(moved)} are one another's: exchanged, their mean "
        f"KL falls by {(now - best) / len(moved):.3f} nats",
        (now - best) * heads,
        {name: names[other] for name, other in zip(names, order, strict=True) if name != names[other]},
    )
