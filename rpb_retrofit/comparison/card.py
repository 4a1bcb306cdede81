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
            ours, theirs = (_lowest(group, part) for group in (t5, others))
            if ours is None or theirs is None or theirs[part]["mean"] >= ours[part]["mean"]:
                continue
            found = pairs.get((at, theirs["id"], ours["id"]))
            sign = 1 if found else -1
            found = found or pairs[at, ours["id"], theirs["id"]]
            low, high = sorted((sign * found["low"], sign * found["high"]))
            sure = "" if found["real"] else ", no sure difference"
            inside = f"inside ({ours['inside']['length']:,} tokens)" if ours["inside"] else ""
            place = f"at {result['target']:,} tokens" if at == "target" else inside
            yield (
                f"{budget}, {place}: {ours['id']}, the best T5 arm, loses {sign * found['mean']:+.3f} "
                f"({low:+.3f} to {high:+.3f}) nats a token more than {theirs['id']}{sure}"
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
    ours, theirs = _gains(t5), _gains(others)
    for distance in sorted(ours.keys() & theirs.keys()):
        (own, name), (other, better) = max(ours[distance]), max(theirs[distance])
        if other > own:
            yield (
                f"{budget}, a span repeated after {distance:,} tokens: brings {own:+.2f} nats a token with {name}, "
                f"{other:+.2f} with {better}"
            )


def _gains(rows: Sequence[Row]) -> dict[int, list[tuple[float, str]]]:
    """What a repeated span brings to each arm, by its distance."""
    found: dict[int, list[tuple[float, str]]] = {}
    for row in rows:
        for span in row["induction"]:
            found.setdefault(span["distance"], []).append((span["mean"], row["id"]))
    return found


def _slower(t5: Sequence[Row], others: Sequence[Row]) -> Iterator[str]:
    """How much more time the fastest T5 arm takes than the fastest other."""
    for what, key in (("reading a prompt", "prefill_s"), ("a token", "decode_s")):
        ours, theirs = (
            min(((row["speed"][-1][key], row["id"]) for row in group if _timed(row)), default=None)
            for group in (t5, others)
        )
        if ours and theirs and ours[0] > theirs[0]:
            yield (
                f"{what}: {ours[1]}, the fastest T5 arm, takes {ours[0] / theirs[0]:.2f} times as long as {theirs[1]}"
            )


def _timed(row: Row) -> bool:
    return bool(row["speed"]) and "skipped" not in row["speed"][-1]


def loss(found: Mapping[str, Any] | None) -> str:
    """A mean loss."""
    return "not measured" if found is None else f"{found['mean']:.3f}"


def gap(found: Mapping[str, Any] | None) -> str:
    """What it is above the reference, with its interval; in bold where that is real."""
    if found is None or (above := found["above"]) is None:
        return ""
    said = as_difference(above).interval
    return f"**{said}**" if above["real"] else said


def times(row: Row) -> str:
    """Reading a prompt and a token, over the source's time."""
    if not _timed(row) or row["tokens"]:
        return ""
    return f"{row['speed'][-1]['prefill_over']:.2f} / {row['speed'][-1]['decode_over']:.2f}"
