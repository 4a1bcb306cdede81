"""``python -m tests.matrix FOLDER``: a real model, retrofitted in every sort, healthy and with faults, diagnosed.

FOLDER holds the retrofits and a line of JSON for each diagnosis that is done; the same command goes on after the last
one. With ``--part 0/2`` and ``--part 1/2`` two processes share the work, by pairs of texts. At the end, or with
``--table`` at once, it prints the table of model_cards/diagnosis.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.matrix.cases import Case, healthy, planted, run
from tests.matrix.table import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.table:
        part, parts = map(int, given.part.split("/"))
        cases = [case for case in (*planted(), *healthy()) if case.pair * parts // 4 == part]
        _go_on(given.folder, [case for case in cases if given.only in case.name], given.part.replace("/", "-of-"))
    print(table(read(given.folder)))


def _go_on(folder: Path, cases: list[Case], part: str) -> None:
    done = {row["case"] for row in read(folder)}
    with (folder / f"diagnoses-{part}.jsonl").open("a") as file:
        for case in cases:
            if case.name in done:
                continue
            try:
                row = run(case, folder)
            except Exception:
                traceback.print_exc()
                print(f"FAILED: {case.name}", file=sys.stderr, flush=True)
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{row['seconds']:.0f} s {row['case']}: {', '.join(row['named']) or 'nothing'}", flush=True)


def read(folder: Path) -> list[dict[str, Any]]:
    """The diagnoses that are done."""
    return [json.loads(line) for file in sorted(folder.glob("diagnoses-*.jsonl")) for line in file.open()]


if __name__ == "__main__":
    main()
