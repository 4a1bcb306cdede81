"""What healing costs and brings at a real source's own context: its retrofits are calibrated on a text, learn from the
source on so many tokens of it, and are measured on other texts, inside the context and at several times it.

The control, the source trained by the same recipe, is the source itself: it learns from its own predictions, so its
loss is zero from the first step on. Each arm is a process of its own, where wanted, and all arms share one accelerator:

    python scripts/heal.py SOURCE OUT --data faq.jsonl --held-out novel-1.txt --held-out novel-2.txt --arms kept-flat
    python scripts/heal.py SOURCE OUT --arms none --card card.md

OUT/ARM/result.json holds what is known so far; the same command goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from heal_arm import ArmRun
from heal_card import write_card
from heal_plan import ABOUT, HealingPlan

from rpb_retrofit.errors import ConfigError


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a GGUF file, a folder or a hub id")
    parser.add_argument("out", type=Path, help="a folder, which is made or gone on with")
    parser.add_argument("--data", action="append", default=[], help="text to calibrate and train on; may come again")
    parser.add_argument("--held-out", action="append", default=[], help="text to measure on; may come again")
    parser.add_argument("--arms", default=",".join(ABOUT), help="which, with commas between, or none")
    for name in ("length", "tokens", "batch-tokens", "calibration", "windows", "ends", "items", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(HealingPlan, name.replace("-", "_")))
    for name in ("rate", "table-rate"):
        parser.add_argument(f"--{name}", type=float, default=getattr(HealingPlan, name.replace("-", "_")))
    parser.add_argument("--precision", choices=("bf16", "no"), default=HealingPlan.precision)
    parser.add_argument("--times", default=",".join(map(str, HealingPlan.times)), help="how many times the context")
    parser.add_argument("--card", type=Path, help="a Markdown file for what is known of all arms, with a picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    arms = [] if options.arms == "none" else options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ABOUT]:
        raise ConfigError(f"arm '{unknown[0]}': choose from {', '.join(ABOUT)}, or none")
    given = {name: value for name, value in vars(options).items() if name in HealingPlan.__dataclass_fields__}
    given |= {"data": tuple(options.data), "held_out": tuple(options.held_out)}
    plan = HealingPlan(**{**given, "times": tuple(map(int, options.times.split(",")))})
    if arms and not (plan.data and plan.held_out):
        raise ConfigError("give --data to train on, and --held-out to measure on")
    for arm in arms:
        ArmRun(arm, options.out / arm, plan).run()
    if options.card:
        write_card(options.out, options.card, ABOUT)


if __name__ == "__main__":
    main()
