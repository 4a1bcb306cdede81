"""What a diagnosis measured, as the exhibits of its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rpb_retrofit.diagnosis import plots
from rpb_retrofit.pages.drawing import as_data_uri
from rpb_retrofit.pages.page import Exhibit, Table
from rpb_retrofit.pages.retrieval_exhibits import QUESTIONS, SPANS, answers, shares, shares_width
from rpb_retrofit.pages.words import EFFECT, begun, detected, effect, interval, number

LISTED_OFFSETS = 14
"""Offsets whose numbers the page lists, of all those in its picture: with 270 heads all of them would be megabytes."""


def exhibits(figures: Mapping[str, Any]) -> Iterator[Exhibit]:
    """Whatever of the exhibits was measured, in the order of the page."""
    yield from _losses(figures.get("loss") or {})
    if figures.get("factorial"):
        yield _factorial(figures["factorial"])
    if (figures.get("bias") or {}).get("retrofit"):
        yield _bias(figures["bias"])
    if figures.get("fidelity"):
        yield _fidelity(figures["fidelity"])
    if figures.get("coverage"):
        yield _coverage(figures["coverage"])
    yield from _context(figures.get("retrieval") or {})
    if figures.get("entropy"):
        yield _entropy(figures["entropy"])
    if figures.get("speed"):
        yield _speed(figures["speed"])


def _losses(losses: Mapping[str, Any]) -> Iterator[Exhibit]:
    key = losses.get("key_tokens")
    unsure = f": {detected(key)}" if key and not key["real"] else ""
    far = (
        [
            f"On the {key['tokens']} tokens that the source predicts well only with far context, in windows of "
            f"{key['length']}, the retrofit costs {interval(key)} nats a token{unsure}."
        ]
        if key
        else []
    )
    if losses.get("costs"):
        rows = [[f"{c['arm']} above {c['above']}", str(c["length"]), *effect(c)] for c in losses["costs"]]
        yield Exhibit(
            "cost",
            "Cost by length",
            "What an arm loses above another on the same tokens. A filled marker is a difference that was found, a "
            "hollow one is none; all lengths and pairs are controlled together. Bars are 95% intervals.",
            [Table("Costs", ("pair", "tokens", *EFFECT), rows), *_mean_losses(losses)],
            as_data_uri(lambda: plots.cost(losses["costs"])),
            "Cost in nats a token by length of the window, a line for each pair of arms; numbers in the table below.",
            far,
        )
    elif losses.get("mean"):
        yield Exhibit("cost", "Loss by length", "Mean loss in nats a token.", _mean_losses(losses), sentences=far)
    if losses.get("by_position"):
        positions = losses["by_position"]
        rows = [
            [
                r["arm"],
                str(r["length"]),
                f"{r['first']} to {r['last']}",
                *(number(r[k]) for k in ("nll", "low", "high")),
            ]
            for r in positions
        ]
        yield Exhibit(
            "loss-by-position",
            "Loss by position",
            "Each position in the shortest windows that hold it, of which there are most; bands are 95% intervals.",
            [Table("Losses in nats a token", ("arm", "window", "positions", "loss", "low (95%)", "high (95%)"), rows)],
            as_data_uri(lambda: plots.loss_by_position(positions)),
            "Loss in nats a token by position in the window, a line for each arm; numbers in the table below.",
        )


def _mean_losses(losses: Mapping[str, Any]) -> list[Table]:
    mean = losses.get("mean") or {}
    lengths = sorted({length for by_length in mean.values() for length in by_length}, key=int)
    rows = [[length, *(number(by_length.get(length)) for by_length in mean.values())] for length in lengths]
    return [Table("Mean losses in nats a token", ("tokens", *mean), rows)]


def _factorial(crossings: Sequence[Mapping[str, Any]]) -> Exhibit:
    named = {"gap": "as they are", "method": "positional method", "factor": "factor", "both": "both together"}
    rows = [[c["name"], named[of], *effect(c[of])] for c in crossings for of in named]
    cells = [[c["name"], *(number(c["cells"][k]) for k in _CELLS)] for c in crossings]
    return Exhibit(
        "factorial",
        "Method or scale",
        "The positional method crossed with other things that change scores by position or in size, each switched on "
        "and off under both methods on the same text. The method: the retrofit above the source without the factor. "
        "The factor: with it above without it, under the source's method. Both together: what is left. A filled "
        "marker is an effect that was found, a hollow one is none; bars are 95% intervals.",
        [
            Table("Effects in nats a token", ("factor", "effect of", *EFFECT), rows),
            Table("Losses of the four cells, in nats a token", ("factor", *_CELLS.values()), cells),
        ],
        as_data_uri(lambda: plots.factorial(crossings)),
        "Effects of the positional method, of each factor and of both together on the loss, with 95% intervals; "
        "numbers in the table below.",
        [f"{begun(c['name'])} ({c['about']}): {c['sentence']}." for c in crossings],
    )


_CELLS = {
    "source": "source without it",
    "source_with": "source with it",
    "retrofit": "retrofit without it",
    "retrofit_with": "retrofit with it",
}


def _bias(tables: Mapping[str, Any]) -> Exhibit:
    offsets = tables["offsets"]
    step = max(1, math.ceil(len(offsets) / LISTED_OFFSETS))
    listed = range(0, len(offsets), step)
    named = {"retrofit": "the retrofit's", "source": "the source's"}
    rows = [
        [name, str(head), owner, *(number(line[i], "+.2f") for i in listed)]
        for name in tables["retrofit"]
        for role, owner in named.items()
        for head, line in enumerate((tables.get(role) or {}).get(name, ()))
    ]
    rest = "" if step == 1 else f" One offset of {step}; the others are in the result as JSON."
    return Exhibit(
        "bias",
        "The bias by offset",
        "A row for each layer and head, heads in their order, white lines between layers; light is more, dark is less, "
        "in all panels alike, and the offsets are spaced as their logarithms. Each head's mean is removed, as "
        "attention does not see it. "
        + (
            "The source has no table of its own: what stands for it is the best table of the same buckets for what it "
            "attends to."
            if tables.get("source")
            else "Without a source there is nothing to hold it against."
        ),
        [
            Table(
                f"Bias less the head's mean.{rest}",
                ("attention", "head", "whose", *(str(offsets[i]) for i in listed)),
                rows,
            )
        ],
        as_data_uri(lambda: plots.bias(offsets, tables), "png"),
        "Heat maps of the bias by offset, a row for each layer and head; numbers in the table below.",
        least_width=44,
    )


def _fidelity(fidelity: Mapping[str, Mapping[str, float]]) -> Exhibit:
    rows = [[name, *(number(kl[key]) for key in ("own", "none", "best"))] for name, kl in fidelity.items()]
    head = ("attention", "these tables", "no table", "best of the same buckets")
    return Exhibit(
        "fidelity",
        "How near the tables bring attention to the source's",
        "Mean Kullback-Leibler divergence from the source's attention, in nats: 0 is the same attention.",
        [Table("Divergence by layer", head, rows)],
    )


def _coverage(coverage: Mapping[str, Any]) -> Exhibit:
    trained = coverage["trained_pairs"]
    share = coverage["share"]
    rows = [
        [str(i), f"{100 * part:.2f}%", "not known" if trained is None else f"{trained[i]:,}"]
        for i, part in enumerate(share)
    ]
    return Exhibit(
        "coverage",
        "What the buckets hold",
        f"Share of all pairs of tokens that fall into each bucket, in windows of {coverage['length']}. "
        + (
            "How many pairs trained each is not known."
            if trained is None
            else "Below, how many pairs trained each; a cross is a bucket that none did."
        ),
        [Table("Pairs by bucket", ("bucket", "share of the pairs", "pairs that trained it"), rows)],
        as_data_uri(lambda: plots.coverage(share, trained)),
        f"Share of the pairs of tokens by bucket, {len(share)} bars; numbers in the table below.",
    )


def _context(retrieval: Mapping[str, Any]) -> Iterator[Exhibit]:
    if retrieval.get("induction"):
        gains = retrieval["induction"]
        rows = [[row["arm"], str(row["distance"]), *effect(row)] for row in gains]
        yield Exhibit(
            "induction",
            "A repeated span",
            SPANS,
            [Table("Gain in nats a token", ("arm", "distance", *EFFECT), rows)],
            as_data_uri(lambda: plots.induction(gains)),
            "Gain from a repeated span by distance, a line for each arm; numbers in the table below.",
        )
    if retrieval.get("local_order"):
        orders = retrieval["local_order"]
        yield Exhibit(
            "local-order",
            "The order of neighbours",
            "By how much text is predicted better when the neighbours in its context stand in their order. A filled "
            "marker is a gain that was found, a hollow one is none; bars are 95% intervals.",
            [Table("Gain in nats a token", ("arm", *EFFECT), [[row["arm"], *effect(row)] for row in orders])],
            as_data_uri(lambda: plots.local_order(orders)),
            "Gain from the order of neighbours for each arm, with 95% intervals; numbers in the table below.",
        )
    if retrieval.get("questions"):
        yield _questions(retrieval["questions"], retrieval["compared"])


def _questions(cells: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]) -> Exhibit:
    tables = [answers(cells)]
    if compared:
        named = {"correct": "share right", "nll": "loss of the answer, nats a token"}
        lines = [[c["kind"], what, *effect(c[key])] for c in compared for key, what in named.items()]
        tables.append(Table("The retrofit less the source, question by question", ("kind", "of", *EFFECT), lines))
    return Exhibit(
        "questions",
        "Questions about a long context",
        QUESTIONS,
        tables,
        as_data_uri(lambda: shares(cells, "arm", "kind")),
        "Heat maps of the share of questions answered right, a panel for each arm; numbers in the table below.",
        least_width=shares_width(cells),
    )


def _entropy(rows: Sequence[Mapping[str, Any]]) -> Exhibit:
    lines = [[r["arm"], str(r["keys"]), *(number(r[key]) for key in ("mean", "low", "high"))] for r in rows]
    return Exhibit(
        "entropy",
        "How widely attention spreads",
        "Mean entropy of the attention of all heads, by how many keys a query sees. Bands hold the middle half of the "
        "heads.",
        [Table("Entropy in nats", ("arm", "visible keys", "mean", "lower quartile", "upper quartile"), lines)],
        as_data_uri(lambda: plots.entropy(rows)),
        "Entropy of attention by the number of visible keys, a line for each arm; numbers in the table below.",
    )


def _speed(rows: Sequence[Mapping[str, Any]]) -> Exhibit:
    source = {row["length"]: row for row in rows if row["arm"] == "source" and "skipped" not in row}

    def timed(row: Mapping[str, Any], key: str) -> list[str]:
        base = source.get(row["length"])
        return [number(row[key], ",.1f"), number(row[key] / base[key] if base else None, ".2f")]

    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["arm"], str(row["length"]), f"skipped: {row['skipped']}", *[""] * 6])
            continue
        memory = row["peak_bytes"]
        lines.append(
            [
                *(row["arm"], str(row["length"])),
                *timed(row, "prefill_tokens_per_s"),
                number(1000 * row["first_token_s"], ",.1f"),
                *timed(row, "decode_tokens_per_s"),
                number(None if memory is None else memory / 2**20, ",.1f"),
                str(row["rounds"]),
            ]
        )
    head = (
        *("arm", "tokens", "prefill (tokens/s)", "over the source's", "first token (ms)"),
        *("decoding (tokens/s)", "over the source's", "peak memory (MiB)", "rounds"),
    )
    return Exhibit(
        "speed",
        "Speed and memory",
        "Side by side in one run, medians of the rounds; compare the ratios, not the numbers of other machines. Memory "
        "is without the weights.",
        [Table("Speed and memory", head, lines)],
        open=True,
    )
