"""``rpb demo``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rpb_retrofit.cli.options import Buckets, Json, MaxDistance
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, show, table
from rpb_retrofit.config import RetrofitConfig


def command(
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.")] = Path("demo"),
    buckets: Buckets = 32,
    max_distance: MaxDistance = 128,
    json: Json = None,
) -> None:
    """Fetch a small real model, retrofit it, and report what that cost."""
    from rpb_retrofit.demo.run import run_demo

    check_outputs({"--json": json}, folder=out)
    check_scratch()
    config = RetrofitConfig(relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance)
    demo = run_demo(out, config, lambda line: print(line, flush=True))
    source, *retrofits = demo.arms
    rows = [
        [str(result.length), f"{result.nll:.3f}", *(f"{demo.costs[arm.name][row]:+.3f}" for arm in retrofits)]
        for row, result in enumerate(source.results)
    ]
    lines = [""]
    for arm in retrofits:
        lines += [f"{arm.name}: {arm.report}", ""]
    lines += [table(["window", f"{source.name}: loss", *(f"{arm.name}: cost" for arm in retrofits)], rows), ""]
    for number, beginning in enumerate(demo.beginnings):
        lines.append(beginning)
        lines += [f"  {arm.name}: {' '.join(arm.continuations[number].split())}" for arm in demo.arms]
    lines += ["", f"{sum(demo.seconds.values()):.0f} s. The report: {out / 'report.html'}"]
    show("\n".join(lines), {**asdict(demo), "costs": demo.costs}, json)
