"""The matrix as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """What was named in healthy retrofits, a row a sort and a column a pair of texts; and first where a fault was
    planted."""
    fine = [row for row in rows if row["truth"] is None]
    bad = [row for row in rows if row["truth"] is not None]
    alarms = [row for row in fine if row["named"] or row["failed"]]
    right = [row for row in bad if row["named"][:1] == [row["truth"]]]
    alone = [row for row in right if row["failed"] == {}]
    lines = [
        f"Healthy: {len(fine)} diagnoses, {len(alarms)} false alarms. Planted: {len(right)} of {len(bad)} named first, "
        f"{len(right) - len(alone)} of them while another probe failed.",
        *_noise(rows),
        "",
        *_healthy(fine),
        "",
        "| planted in | fault | named first | also |",
        "|---|---|---|---|",
    ]
    for row in bad:
        first, *rest = row["named"] or ["nothing"]
        wrong = "" if first == row["truth"] else f" (wrong: {row['truth']})"
        place, _, fault = row["case"].partition(": ")
        lines.append(f"| {place} | {fault} | {first}{wrong} | {', '.join(rest)} |")
    return "\n".join(lines)


def _noise(rows: Sequence[Row]) -> list[str]:
    """By how much healthy retrofits' logits differ between ways to feed a text, and the measured noise."""
    ways = [max(row["ways"].values()) for row in rows if row["truth"] is None and row.get("ways")]
    noise = [row["noise"] for row in rows if row["truth"] is None and row.get("ways")]
    if not ways:
        return []
    return [
        f"Ways to feed a text, healthy: logits differ by at most {max(ways):.1e} of the largest one; noise "
        f"{min(noise):.1e} to {max(noise):.1e}."
    ]


def _healthy(rows: Sequence[Row]) -> list[str]:
    """The healthy ones, of which a name says sort, dtype and texts."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        sort, dtype, texts = row["case"].split(", ", 2)
        cells.setdefault(sort, {})[f"{texts}, {dtype}"] = ", ".join(row["named"]) or "nothing"
    columns = sorted({column for by_pair in cells.values() for column in by_pair})
    return [
        f"| healthy retrofit | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| {sort} | {' | '.join(by_pair.get(column, '') for column in columns)} |"
            for sort, by_pair in cells.items()
        ),
    ]
