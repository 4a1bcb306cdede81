"""The demo's report, one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from rpb_retrofit.demo import pictures
from rpb_retrofit.demo.result import Demo
from rpb_retrofit.pages.drawing import LineStyles, as_data_uri
from rpb_retrofit.pages.page import SHARED, Exhibit, Table, write
from rpb_retrofit.pages.words import EFFECT, effect
from rpb_retrofit.version import __version__


def write_report(demo: Demo, bias_pictures: Mapping[str, str], file: Path) -> None:
    """Write the page to ``file``. ``bias_pictures``: the tables of each retrofit drawn, as addresses, by its name."""
    shown = [
        _lengths(demo),
        _positions(demo),
        _spans(demo),
        *_tables(demo, bias_pictures),
        _continuations(demo),
        _next(demo),
    ]
    calibration = next(arm.report.calibration for arm in demo.arms if arm.report is not None)
    untrained = "untrained: fitted to what the source's heads attend to and hand on"
    windows = f", on {calibration.windows} windows of up to {calibration.length} tokens" if calibration else ""
    (whole, kept), longest = demo.costs.values(), demo.arms[0].results[-1].length
    (whole_found, kept_found), farthest = demo.kept.values(), max(demo.arms[0].gains)
    write(
        file,
        SHARED,
        "exhibits.html",
        title=f"{demo.source}: RoPE out, T5 bias in",
        contents={exhibit.name: exhibit.title for exhibit in shown},
        headline=f"Untrained, the T5 bias costs {whole[-1]:+.2f} nats a token at {longest:,} tokens, and keeps "
        f"{whole_found[farthest]:.0%} of what a span that comes again gains {farthest:,} tokens below; beside RoPE's "
        f"high frequencies {kept[-1]:+.2f} and {kept_found[farthest]:.0%}",
        answer=[
            "The first is the bias in the place of all of RoPE: tables, and a factor on the content of each query head "
            "and frequency. In the second, RoPE's frequencies whose wavelength fits the trained context go on "
            "rotating, and the bias replaces the others.",
            f"rpb_retrofit {__version__}, {untrained}{windows}.",
        ],
        exhibits=shown,
    )


def _styles(demo: Demo) -> LineStyles:
    return pictures.styles_of([arm.name for arm in demo.arms])


def _lengths(demo: Demo) -> Exhibit:
    source = demo.arms[0]
    rows = [
        [f"loss, windows of {length.length:,}", f"{length.nll:.3f}"]
        + [f"{costs[number]:+.3f}" for costs in demo.costs.values()]
        for number, length in enumerate(source.results)
    ]
    rows += [
        [f"gain of a span {distance:,} below", f"{fmean(gains):.1f}"]
        + [f"{kept[distance]:.0%} kept" for kept in demo.kept.values()]
        for distance, gains in source.gains.items()
    ]
    return Exhibit(
        "lengths",
        "What it costs, and what it keeps",
        f"Nats a token, the same text at every length: {demo.text}. Its first half is scored, the second was for "
        f"calibration, so source and tables meet one kind of text. Windows do not overlap; {demo.policy}. A few "
        "thousand tokens of one text: read differences of tenths, not of hundredths. The loss hardly depends on what "
        "stands far above; what a span of random tokens gains by having stood there depends on nothing else.",
        [],
        shown=[
            Table(
                "Nats a token: the source's, and what each retrofit loses or keeps of it",
                ("at (tokens)", source.name, *demo.costs),
                rows,
            )
        ],
    )


def _positions(demo: Demo) -> Exhibit:
    return Exhibit(
        "positions",
        "What is lost by position",
        "Loss above the source's by position in the window, each bin from the shortest windows that reach it. A filled "
        "marker is a difference that was found, a hollow one is none; bars are 95% intervals.",
        [
            Table(
                "Nats a token above the source",
                ("retrofit", "positions", "windows of", *EFFECT),
                [[r["arm"], f"{r['first']}-{r['last']}", f"{r['length']:,}", *effect(r)] for r in demo.by_position],
            )
        ],
        as_data_uri(lambda: pictures.above_source(demo.by_position, _styles(demo))),
        "Loss above the source's by position, a line for each retrofit; numbers in the table below.",
        least_width=_LINES,
    )


def _spans(demo: Demo) -> Exhibit:
    gains = {arm.name: arm.gains for arm in demo.arms}
    return Exhibit(
        "spans",
        "What a repeated span gains",
        "By how much a span of random tokens is predicted better for having stood in the context before, by the "
        "distance between the two. A few spans only: bars reach from the least to the most of them.",
        [
            Table(
                "Gain in nats a token",
                ("model", "distance", "spans", "mean", "least", "most"),
                [
                    [
                        *(name, f"{distance:,}", str(len(items))),
                        *(f"{gain:+.2f}" for gain in (fmean(items), min(items), max(items))),
                    ]
                    for name, by_distance in gains.items()
                    for distance, items in by_distance.items()
                ],
            )
        ],
        as_data_uri(lambda: pictures.span_gains(gains, _styles(demo))),
        "Gain from a repeated span by distance, a line for each model; numbers in the table below.",
        least_width=_LINES,
    )


_LINES = 30
"""Rem that lines with names at their ends need."""


def _tables(demo: Demo, bias_pictures: Mapping[str, str]) -> Iterator[Exhibit]:
    """The bias of each retrofit, and what its making says of itself."""
    for arm in demo.arms[1:]:
        yield Exhibit(
            f"tables-{arm.folder}",
            f"The tables: {arm.name}",
            "The bias of every layer against the offset, the mean over its heads.",
            [],
            bias_pictures[arm.name],
            "Bias of every layer against the offset.",
            str(arm.report).splitlines(),
        )


def _continuations(demo: Demo) -> Exhibit:
    return Exhibit(
        "continuations",
        "How they go on",
        f"The most likely token each time, {demo.new_tokens} tokens.",
        [],
        sentences=[
            f"{beginning} … {arm.name}: {' '.join(arm.continuations[number].split())}"
            for number, beginning in enumerate(demo.beginnings)
            for arm in demo.arms
        ],
    )


def _next(demo: Demo) -> Exhibit:
    folders = [str(arm.folder) for arm in demo.arms[1:]]
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in demo.seconds.items())
    return Exhibit(
        "next",
        "Next",
        f"The retrofits are in the folders {' and '.join(folders)} beside this page.",
        [],
        sentences=[
            f'Load one with rpb_retrofit.load("{folders[-1]}"), or where rpb_retrofit is not installed with '
            f'AutoModelForCausalLM.from_pretrained("{folders[-1]}", trust_remote_code=True), and fine-tune it like any '
            "other model.",
            f"Wall time: {steps}.",
        ],
    )
