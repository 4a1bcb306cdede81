"""A comparison as Markdown with its pictures beside it, for a repository: where T5's bias loses comes first."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rpb_retrofit.comparison.arms import ARMS
from rpb_retrofit.comparison.exhibits import exhibits
from rpb_retrofit.comparison.figures import as_difference
from rpb_retrofit.comparison.ranking import Ranking
from rpb_retrofit.files.whole_file import write_whole
from rpb_retrofit.pages.markdown import FILTERS

Row = Mapping[str, Any]
SHOWN = ("quality", "inside", "lengths", "positions", "induction")
"""The exhibits whose pictures a card shows."""


def write_card(result: Mapping[str, Any], file: Path, title: str, about: str = "") -> None:
    """Write the card of ``result``, what `result.result` makes, to ``file``, and its pictures beside it.

    ``about`` is a paragraph in Markdown on what was compared.
    """
    ranking = Ranking(result)
    pictures = {}
    for exhibit in exhibits(ranking):
        if exhibit.name in SHOWN and exhibit.picture:
            head, _, data = exhibit.picture.partition(",")
            suffix = "svg" if "svg" in head else "png"
            picture = file.with_name(f"{file.stem}-{exhibit.name}.{suffix}")
            write_whole(picture, base64.b64decode(data))
            pictures[exhibit.title] = (picture.name, exhibit.alt)
    environment = Environment(
        loader=PackageLoader("rpb_retrofit.comparison", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS, loss=loss, gap=gap, times=times)
    card = environment.get_template("card.md").render(
        title=title,
        about=about,
        result=result,
        rows=ranking.rows.values(),
        answer=result["recommendation"],
        worse=list(where_t5_loses(result)),
        pictures=pictures,
    )
    write_whole(file, card)


def where_t5_loses(result: Mapping[str, Any]) -> Iterator[str]:
    """For each measure and budget of training, whether the best of the T5 arms is behind the best of the others."""
    pairs = {(p["at"], p["a"], p["b"]): p for p in result["pairs"]}
    for trained in sorted({bool(row["tokens"]) for row in result["rows"]}):
        rows = [row for row in result["rows"] if bool(row["tokens"]) is trained and _kind(row) in ARMS]
        t5 = [row for row in rows if _kind(row).startswith("t5")]
        others = [row for row in rows if row not in t5]
        budget = "healed" if trained else "untrained"
        if not t5 or not others:
            continue
        for at, part in (("target", "beyond"), ("inside", "inside")):
            best, rival = (_lowest(group, part) for group in (t5, others))
            if best is None or rival is None or rival[part]["mean"] >= best[part]["mean"]:
                continue
            pair = pairs.get((at, rival["id"], best["id"]))
            sign = 1 if pair else -1
            pair = pair or pairs[at, best["id"], rival["id"]]
            low, high = sorted((sign * pair["low"], sign * pair["high"]))
            sure = "" if pair["real"] else ", no sure difference"
            inside = f"inside ({best['inside']['length']:,} tokens)" if best["inside"] else ""
            place = f"at {result['target']:,} tokens" if at == "target" else inside
            yield (
                f"{budget}, {place}: {best['id']}, the best T5 arm, loses {sign * pair['mean']:+.3f} "
                f"({low:+.3f} to {high:+.3f}) nats a token more than {rival['id']}{sure}"
            )
        yield from _spans(t5, others, budget)
        if not trained:
            yield from _slower(t5, others)


def _kind(row: Row) -> str:
    """The name of a row's arm, without a number behind it."""
    return row["arm"].partition(":")[0]


def _lowest(rows: Sequence[Row], part: str) -> Row | None:
    return min((row for row in rows if row[part]), key=lambda row: row[part]["mean"], default=None)


def _spans(t5: Sequence[Row], others: Sequence[Row], budget: str) -> Iterator[str]:
    """The distances at which a repeated span brings more without T5's bias."""
    with_t5, without = _gains(t5), _gains(others)
    for distance in sorted(with_t5.keys() & without.keys()):
        (own, name), (other, better) = max(with_t5[distance]), max(without[distance])
        if other > own:
            yield (
                f"{budget}, a span repeated after {distance:,} tokens: brings {own:+.2f} nats a token with {name}, "
                f"{other:+.2f} with {better}"
            )


def _gains(rows: Sequence[Row]) -> dict[int, list[tuple[float, str]]]:
    """What a repeated span brings to each arm, by its distance."""
    gains: dict[int, list[tuple[float, str]]] = {}
    for row in rows:
        for span in row["induction"]:
            gains.setdefault(span["distance"], []).append((span["mean"], row["id"]))
    return gains


def _slower(t5: Sequence[Row], others: Sequence[Row]) -> Iterator[str]:
    """How much more time the fastest T5 arm takes than the fastest other."""
    for what, key in (("reading a prompt", "prefill_s"), ("a token", "decode_s")):
        fastest, rival = (
            min(((row["speed"][-1][key], row["id"]) for row in group if _timed(row)), default=None)
            for group in (t5, others)
        )
        if fastest and rival and fastest[0] > rival[0]:
            yield (
                f"{what}: {fastest[1]}, the fastest T5 arm, takes {fastest[0] / rival[0]:.2f} times as long as "
                f"{rival[1]}"
            )


def _timed(row: Row) -> bool:
    return bool(row["speed"]) and "skipped" not in row["speed"][-1]


def loss(mean_loss: Mapping[str, Any] | None) -> str:
    """A mean loss."""
    return "not measured" if mean_loss is None else f"{mean_loss['mean']:.3f}"


def gap(mean_loss: Mapping[str, Any] | None) -> str:
    """What it is above the reference, with its interval; in bold where that is real."""
    if mean_loss is None or (above := mean_loss["above"]) is None:
        return ""
    interval = as_difference(above).interval
    return f"**{interval}**" if above["real"] else interval


def times(row: Row) -> str:
    """Reading a prompt and a token, over the source's time."""
    if not _timed(row) or row["tokens"]:
        return ""
    return f"{row['speed'][-1]['prefill_over']:.2f} / {row['speed'][-1]['decode_over']:.2f}"
