"""The report of a diagnosis: one page that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rpb_retrofit.diagnosis import pictures

EVIDENCE: Mapping[str, Sequence[str]] = {
    "precision": ["bias"],
    "bias_dropped": ["bias"],
    "offset_reversed": ["bias"],
    "off_by_one": ["bias"],
    "wrong_scale": ["factorial"],
    "tables_not_loaded": ["bias"],
    "tables_shared": ["bias"],
    "wrong_order": ["bias"],
    "other_buckets": ["bias", "fidelity"],
    "untrained_buckets": ["coverage"],
    "foreign_tables": ["fidelity", "bias"],
    "far_order_lost": ["coverage", "fidelity"],
    "local_order_lost": ["local-order", "fidelity"],
    "domain_drift": ["cost"],
    "short_context_forgotten": ["cost"],
    "outside_trained_length": ["loss-by-position"],
    "retrieval_lost": ["induction", "questions"],
    "heads_lost": ["induction"],
    "attention_spreads": ["entropy"],
    "other_temperature": ["factorial", "entropy"],
}
"""By hypothesis, the exhibits to look at. What is not here is computed exactly, and its sentence is all there is."""

KINDS: Mapping[str, str] = {
    "running": "Does the model compute what its weights and its config say?",
    "numbers": "Are the numbers what they were meant to be?",
    "choice": "Can the settings express what the source did?",
    "behaviour": "What does the model as a whole do otherwise than its source?",
}
"""What the hypotheses of each kind ask, the deepest first."""

SYMBOLS: Mapping[str, str] = {"confirmed": "●", "can't tell": "?", "excluded": "○"}
"""By verdict, those to be read first in front."""

LISTED_OFFSETS = 14
"""Offsets whose numbers the page lists, of all those in its picture: with 270 heads all of them would be megabytes."""


@dataclass(frozen=True)
class Table:
    """Numbers under a picture. The first cell of a row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exhibit:
    """What was measured: a picture where there is one, how to read it, and its numbers.

    ``name`` is its anchor; ``least_width`` is the width in rem below which the picture scrolls rather than shrinks.
    """

    name: str
    title: str
    caption: str
    tables: Sequence[Table]
    picture: str | None = None
    alt: str = ""
    sentences: Sequence[str] = ()
    least_width: int = 0


def write_report(result: Mapping[str, Any], command: str, file: Path) -> None:
    """Write a page about ``result``, what `Diagnosis.to_dict` says, to ``file``; ``command`` is what repeats it."""
    loader = PackageLoader("rpb_retrofit.diagnosis", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(value=number, begun=_begun)
    figures, exhibits = result["figures"], list(_exhibits(result["figures"]))
    cost = _largest_cost((figures.get("loss") or {}).get("costs", []))
    shown = {exhibit.name: exhibit.title for exhibit in exhibits}
    hypotheses = {hypothesis["name"]: hypothesis for hypothesis in result["hypotheses"]}
    page = environment.get_template("report.html").render(
        result=result,
        command=command,
        exhibits=exhibits,
        evidence={
            name: {anchor: shown[anchor] for anchor in EVIDENCE.get(name, ()) if anchor in shown} for name in hypotheses
        },
        groups=_groups(result["hypotheses"]),
        kinds=KINDS,
        symbols=SYMBOLS,
        causes=[hypotheses[name] for name in result["causes"]],
        untold=[h for h in result["hypotheses"] if h["finding"]["verdict"] == "can't tell"],
        cost=cost or {"real": False},
        cost_sentence=_cost_sentence(cost),
    )
    file.write_text(page, encoding="utf-8")


def number(value: Any, form: str = ".3f") -> str:
    """A number in words where figures cannot say it; what is no number at all as it is."""
    if value is None:
        return "not measured"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {number(item, form)}" for key, item in value.items())
    if isinstance(value, Sequence):
        return ", ".join(number(item, form) for item in value)
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinity"
    return f"{value:{form}}"


def _interval(difference: Mapping[str, Any]) -> str:
    """A mean with its interval."""
    mean = number(difference["mean"], "+.3f")
    if not (math.isfinite(difference["low"]) and math.isfinite(difference["high"])):
        return f"{mean} (no interval: it takes two clusters of text to know the spread)"
    return f"{mean} (95% interval {difference['low']:+.3f} to {difference['high']:+.3f})"


def _found(difference: Mapping[str, Any]) -> str:
    """Whether a difference was found, and if none was, from what size on it would have been."""
    if difference["real"]:
        return "a difference"
    if not math.isfinite(difference["detectable"]):
        return "no difference found; none of any size could have been"
    return f"no difference found; one of {difference['detectable']:.3f} or more would have been, 4 times in 5"


def _effect(difference: Mapping[str, Any]) -> list[str]:
    """The cells of a difference in a table, below `_EFFECT`."""
    return [*(number(difference[key], "+.3f") for key in ("mean", "low", "high")), _found(difference)]


_EFFECT = ("mean", "low (95%)", "high (95%)", "found")


def _begun(sentence: str) -> str:
    """With a capital letter in front; what comes after keeps its own."""
    return f"{sentence[:1].upper()}{sentence[1:]}"


def _largest_cost(costs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """What the retrofit loses above the control, or else the source, where it is most; what is real goes first."""
    for above in ("control", "source"):
        own = [cost for cost in costs if cost["arm"] == "retrofit" and cost["above"] == above]
        if own:
            return {
                **max(own, key=lambda cost: (cost["real"] and cost["mean"] > 0, cost["mean"])),
                "lengths": len(own),
            }
    return None


def _cost_sentence(largest: Mapping[str, Any] | None) -> str:
    """What it costs, with its uncertainty. None found is not the same as none."""
    if largest is None:
        return "Not measured: that takes a source or a control, and a model that predicts the next token."
    count, above = largest["lengths"], largest["above"]
    lengths = f"the largest cost at {count} lengths" if count > 1 else "the only length measured"
    said = f"{_interval(largest)} nats a token against the {above} in windows of {largest['length']}, {lengths}."
    if largest["real"]:
        return said if largest["mean"] > 0 else f"Nothing: {said} The retrofit's loss is the lower one."
    if not math.isfinite(largest["detectable"]):
        return f"No difference found: {said} There is too little text: no effect of any size could have been seen."
    return (
        f"No difference found: {said} That is not to say that there is none: the smallest effect that would have "
        f"been seen 4 times in 5 is {largest['detectable']:.3f}."
    )


def _groups(hypotheses: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The hypotheses by kind, the deepest kind first, and in each by verdict, those to be read first in front."""
    order = list(SYMBOLS)
    found = {
        kind: sorted((h for h in hypotheses if h["kind"] == kind), key=lambda h: order.index(h["finding"]["verdict"]))
        for kind in KINDS
    }
    return {kind: members for kind, members in found.items() if members}


def _exhibits(figures: Mapping[str, Any]) -> Iterator[Exhibit]:
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
    unsure = f": {_found(key)}" if key and not key["real"] else ""
    far = (
        [
            f"On the {key['tokens']} tokens that the source predicts well only with far context, in windows of "
            f"{key['length']}, the retrofit costs {_interval(key)} nats a token{unsure}."
        ]
        if key
        else []
    )
    if losses.get("costs"):
        rows = [[f"{c['arm']} above {c['above']}", str(c["length"]), *_effect(c)] for c in losses["costs"]]
        yield Exhibit(
            "cost",
            "Cost by length",
            "What an arm loses above another on the same tokens. A filled marker is a difference that was found, a "
            "hollow one is none; all lengths and pairs are controlled together. Bars are 95% intervals.",
            [Table("Costs", ("pair", "tokens", *_EFFECT), rows), *_mean_losses(losses)],
            pictures.as_data_uri(lambda: pictures.cost(losses["costs"])),
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
            pictures.as_data_uri(lambda: pictures.loss_by_position(positions)),
            "Loss in nats a token by position in the window, a line for each arm; numbers in the table below.",
        )


def _mean_losses(losses: Mapping[str, Any]) -> list[Table]:
    mean = losses.get("mean") or {}
    lengths = sorted({length for by_length in mean.values() for length in by_length}, key=int)
    rows = [[length, *(number(by_length.get(length)) for by_length in mean.values())] for length in lengths]
    return [Table("Mean losses in nats a token", ("tokens", *mean), rows)]


def _factorial(crossings: Sequence[Mapping[str, Any]]) -> Exhibit:
    named = {"gap": "as they are", "method": "positional method", "factor": "factor", "both": "both together"}
    rows = [[c["name"], named[effect], *_effect(c[effect])] for c in crossings for effect in named]
    cells = [[c["name"], *(number(c["cells"][k]) for k in _CELLS)] for c in crossings]
    return Exhibit(
        "factorial",
        "Method or scale",
        "The positional method crossed with other things that change scores by position or in size, each switched on "
        "and off under both methods on the same text. The method: the retrofit above the source without the factor. "
        "The factor: with it above without it, under the source's method. Both together: what is left. A filled "
        "marker is an effect that was found, a hollow one is none; bars are 95% intervals.",
        [
            Table("Effects in nats a token", ("factor", "effect of", *_EFFECT), rows),
            Table("Losses of the four cells, in nats a token", ("factor", *_CELLS.values()), cells),
        ],
        pictures.as_data_uri(lambda: pictures.factorial(crossings)),
        "Effects of the positional method, of each factor and of both together on the loss, with 95% intervals; "
        "numbers in the table below.",
        [f"{_begun(c['name'])} ({c['about']}): {c['sentence']}." for c in crossings],
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
        [name, str(head), whose, *(number(line[i], "+.2f") for i in listed)]
        for name in tables["retrofit"]
        for role, whose in named.items()
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
        pictures.as_data_uri(lambda: pictures.bias(offsets, tables), "png"),
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
        pictures.as_data_uri(lambda: pictures.coverage(share, trained)),
        f"Share of the pairs of tokens by bucket, {len(share)} bars; numbers in the table below.",
    )


def _context(retrieval: Mapping[str, Any]) -> Iterator[Exhibit]:
    if retrieval.get("induction"):
        gains = retrieval["induction"]
        rows = [[row["arm"], str(row["distance"]), *_effect(row)] for row in gains]
        yield Exhibit(
            "induction",
            "A repeated span",
            "By how much a span of random tokens is predicted better for having stood in the context before, by the "
            "distance between the two. A filled marker is a gain that was found, a hollow one is none; bars are 95% "
            "intervals.",
            [Table("Gain in nats a token", ("arm", "distance", *_EFFECT), rows)],
            pictures.as_data_uri(lambda: pictures.induction(gains)),
            "Gain from a repeated span by distance, a line for each arm; numbers in the table below.",
        )
    if retrieval.get("local_order"):
        orders = retrieval["local_order"]
        yield Exhibit(
            "local-order",
            "The order of neighbours",
            "By how much text is predicted better when the neighbours in its context stand in their order. A filled "
            "marker is a gain that was found, a hollow one is none; bars are 95% intervals.",
            [Table("Gain in nats a token", ("arm", *_EFFECT), [[row["arm"], *_effect(row)] for row in orders])],
            pictures.as_data_uri(lambda: pictures.local_order(orders)),
            "Gain from the order of neighbours for each arm, with 95% intervals; numbers in the table below.",
        )
    if retrieval.get("questions"):
        yield _questions(retrieval["questions"], retrieval["compared"])


def _questions(cells: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]]) -> Exhibit:
    rows = [
        [
            *(c["arm"], c["kind"], str(c["length"]), "spread" if c["depth"] is None else f"{c['depth']:.0%}"),
            *(str(c["items"]), f"{c['correct']:.0%}", number(c["nll"])),
        ]
        for c in cells
    ]
    tables = [Table("Answers", ("arm", "kind", "tokens", "depth", "questions", "right", "loss of the answer"), rows)]
    if compared:
        named = {"correct": "share right", "nll": "loss of the answer, nats a token"}
        lines = [[c["kind"], what, *_effect(c[key])] for c in compared for key, what in named.items()]
        tables.append(Table("The retrofit less the source, question by question", ("kind", "of", *_EFFECT), lines))
    return Exhibit(
        "questions",
        "Questions about a long context",
        "Share of the questions whose likeliest continuation is the right answer, by kind, length of the context and "
        "how far into it the answer stands; spread: it has to be gathered from all over it. Light is more.",
        tables,
        pictures.as_data_uri(lambda: pictures.questions(cells)),
        "Heat maps of the share of questions answered right, a panel for each arm; numbers in the table below.",
        least_width=12 + 3 * len({(cell["length"], cell["depth"]) for cell in cells}),
    )


def _entropy(rows: Sequence[Mapping[str, Any]]) -> Exhibit:
    lines = [[r["arm"], str(r["keys"]), *(number(r[key]) for key in ("mean", "low", "high"))] for r in rows]
    return Exhibit(
        "entropy",
        "How widely attention spreads",
        "Mean entropy of the attention of all heads, by how many keys a query sees. Bands hold the middle half of the "
        "heads.",
        [Table("Entropy in nats", ("arm", "visible keys", "mean", "lower quartile", "upper quartile"), lines)],
        pictures.as_data_uri(lambda: pictures.entropy(rows)),
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
    )
