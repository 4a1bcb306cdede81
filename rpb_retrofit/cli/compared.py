"""The answer of ``rpb compare``, and the table of its arms, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpb_retrofit.files.printable import one_line


def print_answer(result: Mapping[str, Any]) -> None:
    """The answer and the table for the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    answer = result["recommendation"]
    console.print(Text(f"\n{one_line(result['headline'])}", style="bold"))
    for title, key in (
        ("Why", "reasons"),
        ("What the constraints cost", "costs"),
        ("What fails", "failures"),
        ("What would change the answer", "changes"),
    ):
        if answer[key]:
            console.print(Text(f"{title}:"))
            for sentence in answer[key]:
                console.print(Text(f"  {one_line(sentence)}"))
    inside = next((row["inside"]["length"] for row in result["rows"] if row["inside"]), None)
    table = Table(caption="loss in nats a token; below it, that above the source (trained as the row is)")
    for column in (
        "arm",
        f"inside, {inside}",
        f"target, {result['target']}",
        "prefill",
        "decoding",
        "trained on",
        "took",
    ):
        table.add_column(column)
    for row in result["rows"]:
        timed = [speed for speed in row["speed"] if "skipped" not in speed]
        cost = row["cost"]["calibration_s"] + row["cost"]["training_s"]
        table.add_row(
            Text(one_line(row["id"])),
            _loss(row["inside"]),
            Text(one_line(row["broken"])) if row["broken"] else _loss(row["beyond"]),
            *(_times(timed[-1][key] if timed else None) for key in ("prefill_over", "decode_over")),
            f"{row['tokens']:,}" if row["tokens"] else "",
            f"{cost:.0f} s",
        )
    console.print(table)
    for what, reason in result["skipped"].items():
        console.print(Text(one_line(f"skipped: {what}: {reason}")))


def _loss(loss: Mapping[str, Any] | None) -> str:
    from rpb_retrofit.comparison.figures import as_difference

    if loss is None:
        return "not measured"
    gap = loss["above"]
    return f"{loss['mean']:.3f}" + ("" if gap is None else f"\n{as_difference(gap).interval}")


def _times(over: float | None) -> str:
    return "" if over is None else f"{over:.2f}x"
