"""The tables are in the wrong order: of heads within a layer, or of layers."""

from __future__ import annotations

import torch

from rpb_retrofit.diagnosis.exam import Exam
from rpb_retrofit.diagnosis.fidelity import best_order
from rpb_retrofit.diagnosis.finding import Finding, Kind, confirmed, excluded, unknown
from rpb_retrofit.diagnosis.judge import LEFT, NOTABLE, WON_BACK, of_kind
from rpb_retrofit.diagnosis.words import some

CAUSE = "the tables are in the wrong order of heads or layers"
PREDICTS = "the source's attention is nearer when heads exchange their rows, or layers their tables"
KIND = Kind.NUMBERS
REMEDY = (
    "put the tables back in their order, or calibrate again; after a change of head order, permute the tables as well"
)


def examine(exam: Exam) -> Finding:
    """Find the assignment of rows to heads, and of tables to layers, that is nearest to the source."""
    acting = of_kind(exam, "with its heads in another order") + of_kind(exam, "another layer's")
    if acting:
        return confirmed(
            f"the bias that acts is another head's or layer's than the table's in {some(acting)}",
            REMEDY,
        )
    if (fidelity := exam.fidelity) is None:
        return unknown("only the source's attention tells whose table it is; give --source")
    layers = _layers(exam)
    heads, gain = {}, 0.0
    for name, cost in fidelity.swaps.items():
        order, best, now = best_order(cost)
        excess = (fidelity.own[name] - fidelity.refit[name]).sum().item()
        moved = [head for head, other in enumerate(order) if head != other]
        left = 2 * LEFT * (fidelity.zeros[name] - fidelity.refit[name]).sum().item()
        near = best - fidelity.refit[name].sum().item() < left  # random rows, too, suit other heads by chance
        if moved and (now - best) / len(moved) > NOTABLE and now - best > WON_BACK * excess and near:
            heads[name] = moved
            gain += now - best
    if layers is not None and layers[1] > gain:
        return confirmed(layers[0], REMEDY)
    if heads:
        which = ", ".join(f"{some([n])}: heads {', '.join(map(str, moved))}" for n, moved in list(heads.items())[:4])
        more = f" and {len(heads) - 4} more layers" if len(heads) > 4 else ""
        return confirmed(
            f"the source's attention is nearer by {gain / sum(map(len, heads.values())):.3f} nats of mean KL when "
            f"heads exchange their rows ({which}{more})",
            REMEDY,
            figures={"heads": heads},
        )
    return excluded("no exchange of rows or of tables brings the attention nearer to the source's")


def _layers(exam: Exam) -> tuple[str, float] | None:
    """The evidence for exchanged layers, and the KL that putting them back wins, summed over heads."""
    fidelity = exam.fidelity
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
    return (
        f"the source's attention says that the tables of {some(moved)} are one another's: exchanged, their mean KL "
        f"falls by {(now - best) / len(moved):.3f} nats",
        (now - best) * heads,
    )
