"""Draw README's picture from the figures of two model cards: what a swap costs, and what it brings beyond the context.

python scripts/plot_costs.py        # writes model_cards/costs.svg
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from rpb_retrofit.evaluation.plots import STYLE, log2_positions, save

CARDS = Path(__file__).parents[1] / "model_cards"

BARS = {
    "zero tables": ("smollm2-135m.md", "zero tables: the yardstick"),
    "tables": ("smollm2-135m.md", "tables"),
    "tables+content": ("smollm2-135m.md", "tables+content"),
    "tables+content, polished": ("smollm2-135m.md", "tables+content, then 100 steps of polish"),
    "tables+content, healed\non 51,100 tokens": ("smollm2-135m-healed.md", "healed, distillation (this run)"),
    "16 frequencies kept,\ntables+content": ("smollm2-135m.md", "16 of 32 frequencies kept, tables+content"),
    "20 frequencies kept,\ntables+content": ("smollm2-135m.md", "20 of 32 kept, tables+content"),
}
"""A label, and the card and row that hold its figure."""

LINES = {"source": "source (RoPE)", "kept-log": "high frequencies kept", "full-log": "T5 bias alone"}
"""An arm of the healed card, and its label."""


def row(card: str, label: str) -> list[str]:
    """The cells behind ``label`` of the first table row of a card that begins with it."""
    for line in (CARDS / card).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == label and len(cells) > 1:
            return cells[1:]
    raise LookupError(f"{card} has no row '{label}'")


def costs() -> dict[str, float]:
    """Cost at 2,048 tokens by way, in nats a token above the source."""
    return {
        label: float(re.findall(r"[+-]\d+\.\d+", " ".join(row(card, name)))[1]) for label, (card, name) in BARS.items()
    }


def far_losses() -> tuple[list[int], dict[str, list[float]]]:
    """The lengths of the healed card's windows, and for each arm the loss at their ends, in nats a token."""
    text = (CARDS / "smollm2-135m-healed-8k.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| arm \| 8,192 .*?(?=\n\n)", text[text.index("Loss of the same tokens") :], re.M | re.S)[
        :1
    ]
    head, _, *rows = (line.strip("|").split("|") for line in table.splitlines())
    series = {cells[0].strip(): [float(cell.split(";")[0]) for cell in cells[1:]] for cells in rows}
    return [int(cell.replace(",", "")) for cell in head[1:]], {label: series[arm] for arm, label in LINES.items()}


def draw() -> Any:
    """The figure: bars left, lines right."""
    with plt.rc_context({**STYLE, "svg.hashsalt": "costs", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.3, 1))
        bars = costs()
        drawn = left.barh(list(bars), list(bars.values()), color=["C7", *["C0"] * 4, *["C2"] * 2], height=0.65)
        left.bar_label(drawn, [f"{value:+.2f}" for value in bars.values()], padding=3)
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        left.set_xlim(0, 2.5)
        left.set_xlabel("nats a token above the source, at 2,048 tokens")
        left.set_title("What the swap costs SmolLM2-135M", fontsize=10)
        lengths, lines = far_losses()
        for (label, values), colour in zip(lines.items(), ("C3", "C2", "C0"), strict=True):
            right.plot(lengths, values, "o-", ms=4, color=colour, label=label)
        log2_positions(right)
        right.set_xticks(lengths, [f"{length:,}" for length in lengths])
        right.set_ylim(0)
        right.set_xlabel("length of the text, in tokens")
        right.set_ylabel("loss at its end, nats a token")
        right.set_title("Beyond its context of 8,192 tokens", fontsize=10)
        right.legend(fontsize=8)
        figure.tight_layout()
    return figure


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.hashsalt": "costs", "svg.fonttype": "none", "font.family": "sans-serif"})
    save(draw(), CARDS / "costs.svg")
