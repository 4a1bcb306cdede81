"""The matrix as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was named in healthy retrofits, and first where a fault was planted."""
    fine = [row for row in rows if row["truth"] is None]
    bad = [row for row in rows if row["truth"] is not None]
    alarms = [row for row in fine if row["named"] or row["failed"]]
    right = [row for row in bad if row["named"][:1] == [row["truth"]]]
    lines = [
        f"Healthy: {len(fine)} diagnoses, {len(alarms)} false alarms. Planted: {len(right)} of {len(bad)} named first.",
        "",
        "| healthy retrofit | named |",
        "|---|---|",
        *(f"| {row['case']} | {', '.join(row['named']) or 'nothing'} |" for row in fine),
        "",
        "| planted | named first | also |",
        "|---|---|---|",
    ]
    for row in bad:
        first, *rest = row["named"] or ["nothing"]
        wrong = "" if first == row["truth"] else f" (wrong: {row['truth']})"
        lines.append(f"| {row['case']} | {first}{wrong} | {', '.join(rest)} |")
    return "\n".join(lines)
